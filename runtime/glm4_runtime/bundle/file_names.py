"""What the files of checkpoints, adapters and bundles are called, in one list for all packages."""

# Of a checkpoint in safetensors, and of an adapter.
CONFIG = "config.json"
SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Of a bundle.
MANIFEST = "manifest.json"
REPORT = "report.json"
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
ENGINE = "model.engine"

# Side files: those beside the weights, which a checkpoint brings along and a bundle keeps.
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

# How quantizers say what they did, where config.json does not.
QUANTIZATION_CONFIGS = ("hf_quant_config.json", "quantize_config.json")

# Ends of names: weights that are not read.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GGUF = ".gguf"
