"""The file names of checkpoints, adapters and bundles, for all packages."""

# Of a checkpoint in safetensors, and of an adapter.
CONFIG = "config.json"
SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Of a bundle.
MANIFEST = "manifest.json"
REPORT = "report.json"
GRAPH = "model.onnx"
ADAPTER_GRAPH = "model.lora.onnx"  # takes LoRA adapters at run time; has the weights of GRAPH
WEIGHTS = "model.onnx.data"
STAGE_GRAPH, STAGE_WEIGHTS = (
    "stage-{}.onnx",
    "stage-{}.onnx.data",
)  # numbered from 1; in place of GRAPH and WEIGHTS
ENGINE = "model.engine"
STAGE_ENGINE = (
    "stage-{}.{}"  # with the number of the stage, and ENGINE's part after the dot or a profile's file name
)

# Side files: files beside the weights that a bundle copies from the checkpoint.
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
SIDE_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
)

# Configurations of quantizers, if config.json has none.
QUANTIZATION_CONFIGS = ("hf_quant_config.json", "quantize_config.json")

# Suffixes of weight files that are not read.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GGUF = ".gguf"

LONGEST_FILE_NAME = 255  # bytes, on every usual file system
