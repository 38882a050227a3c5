"""Make the quantized checkpoints in this folder by the tools that users quantize with. The tests need none of the tools.

Each tool wants an environment of its own; torch comes first, so that no tool brings a build for GPUs:

    pip install torch==2.13.0
    pip install torch==2.13.0 "llmcompressor==0.14.*" "transformers==5.17.*"
    python make_quantized.py llm-compressor

    pip install torch==2.13.0 "gptqmodel==7.6.*"
    python make_quantized.py gptqmodel
    python make_quantized.py awq

All folders hold one model of two layers with seeded random weights, quantized in another way each.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import Glm4Config, Glm4ForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
ORIGINAL = HERE / "quantized" / "original"
CONFIG = {
    "attention_bias": True,
    "eos_token_id": [1, 2, 3],
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "tie_word_embeddings": False,
    "vocab_size": 96,
}
SEQUENCES, LENGTH = 8, 32
LEFT = ["lm_head"]


def original() -> Path:
    """The model in bfloat16, before any tool: norms near 1, matrices that keep activations near 1."""
    if (ORIGINAL / "config.json").is_file():
        return ORIGINAL
    torch.manual_seed(20250414)
    model = Glm4ForCausalLM(Glm4Config(**CONFIG)).to(torch.bfloat16)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape)
        if name.endswith("norm.weight"):
            weight.data = (1 + 0.1 * noise).bfloat16()
        elif weight.dim() == 2:
            weight.data = (noise * (1.0 if "embed" in name else weight.shape[1] ** -0.5)).bfloat16()
        else:
            weight.data = (0.1 * noise).bfloat16()
    model.save_pretrained(ORIGINAL)
    return ORIGINAL


def sequences() -> list[list[int]]:
    chance = torch.Generator().manual_seed(1)
    return torch.randint(4, CONFIG["vocab_size"], (SEQUENCES, LENGTH), generator=chance).tolist()


def some_tokenizer() -> PreTrainedTokenizerFast:
    """The tools ask for one, and never use it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0})), pad_token="a", eos_token="a"
    )


def by_llm_compressor() -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    def scheme(weights: dict, inputs: dict | None = None) -> dict:
        return {
            "config_groups": {
                "group_0": QuantizationScheme(
                    targets=["Linear"],
                    weights=QuantizationArgs(**weights),
                    input_activations=None if inputs is None else QuantizationArgs(**inputs),
                )
            }
        }

    channel = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    tensor = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}
    named = {"W4A16": "w4a16", "W4A16_ASYM": "w4a16-asym", "W8A16": "w8a16", "W8A8": "w8a8", "FP8": "fp8",
             "FP8_DYNAMIC": "fp8-dynamic", "FP8_BLOCK": "fp8-block", "NVFP4A16": "nvfp4a16"}  # fmt: skip
    recipes = {folder: {"targets": "Linear", "scheme": name} for name, folder in named.items()}
    recipes["w8a8-static"] = scheme(channel, tensor)
    recipes["w4-rows"] = scheme(channel | {"num_bits": 4, "symmetric": False})
    recipes["w4-groups-of-32"] = scheme(channel | {"num_bits": 4, "strategy": "group", "group_size": 32})
    ids = sequences()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * LENGTH] * SEQUENCES})
    for folder, recipe in recipes.items():
        model = Glm4ForCausalLM.from_pretrained(original(), dtype=torch.bfloat16)
        calibration = {"dataset": data, "processor": some_tokenizer(), "num_calibration_samples": SEQUENCES}
        calibration["max_seq_length"] = LENGTH
        needs_text = folder in ("fp8", "w8a8-static")
        oneshot(
            model=model,
            recipe=QuantizationModifier(ignore=LEFT, **recipe),
            **(calibration if needs_text else {}),
        )
        save(model, f"compressed-tensors-{folder}", save_compressed=True)


def by_gptqmodel() -> None:
    """On a machine with few cores, GPTQMODEL_CPU_WORKERS=2 must be set."""
    from gptqmodel import GPTQModel, QuantizeConfig

    recipes = {
        "gptq-4": {"bits": 4, "group_size": 128, "sym": True, "desc_act": False},
        "gptq-4-asym": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False},
        "gptq-8": {"bits": 8, "group_size": 64, "sym": True, "desc_act": False},
        "gptq-4-act-order": {"bits": 4, "group_size": 32, "sym": True, "desc_act": True},
    }
    data = [{"input_ids": ids, "attention_mask": [1] * LENGTH} for ids in sequences()]
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(original(), copy, dirs_exist_ok=True)
        some_tokenizer().save_pretrained(copy)
        for folder, recipe in recipes.items():
            model = GPTQModel.load(copy, QuantizeConfig(device="cpu", **recipe))
            model.quantize(data, batch_size=1)
            target = HERE / "quantized" / folder
            model.save(str(target))
            record(folder, {f"{name}.weight": values for name, values in dequantized(target)})
            tidy(target)


def awq_by_hand() -> None:
    """AWQ's layout, for which no tool runs without a GPU: written here, read back by gptqmodel's own reader."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    group, target = 64, HERE / "quantized" / "awq-4"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    tensors, values = load_file(original() / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors.pop(name).float().T.unflatten(0, (-1, group))  # [groups, group, rows]
        low, high = weight.amin(1), weight.amax(1)
        scales = ((high - low) / 15).half().contiguous()
        zeros = (-low / scales).round().clamp(0, 15)
        numbers = (weight / scales[:, None] + zeros[:, None]).round().clamp(0, 15).flatten(0, 1)
        module = name.removesuffix(".weight")
        parts = {"qweight": in_words(numbers), "qzeros": in_words(zeros), "scales": scales}
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        values[name] = dequantize_gemm(*parts.values(), 4, group).T
    record("awq-4", values)
    tensors = {name: t.half() if t.dtype == torch.bfloat16 else t.contiguous() for name, t in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((original() / "config.json").read_text())
    config["quantization_config"] = {
        "bits": 4, "group_size": group, "modules_to_not_convert": LEFT, "quant_method": "awq", "version": "gemm",
        "zero_point": True,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    tidy(target)


def in_words(numbers: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of 0 ... 15 -> int32 [rows, columns / 8], columns in the order that AWQ's kernels read."""
    eights = numbers.to(torch.int64).unflatten(1, (-1, 8))
    words = sum(eights[..., column] << 4 * place for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    return words.to(torch.int32).contiguous()


def save(model: Glm4ForCausalLM, folder: str, **options: bool) -> None:
    from transformers.utils.quantization_config import CompressedTensorsConfig

    target = HERE / "quantized" / folder
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target, **options)
    how = CompressedTensorsConfig(run_compressed=False)
    read = Glm4ForCausalLM.from_pretrained(target, dtype=torch.bfloat16, quantization_config=how)
    if "nvfp4" not in folder:  # which the reader computes in steps of bfloat16
        record(
            folder,
            {name: values for name, values in read.state_dict().items() if name.endswith("proj.weight")},
        )
    tidy(target)


def dequantized(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices as gptqmodel itself reads them, [rows, width]."""
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    for name, module in model.model.named_modules():
        if hasattr(module, "qweight"):
            yield name, module.dequantize_weight().T


def record(folder: str, values: dict[str, torch.Tensor]) -> None:
    """Keep what the tool's own reader makes of each matrix, as hashes of the values in the reader's type."""
    path = HERE / "quantized" / "values.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known[folder] = {
        name: [str(value.dtype).removeprefix("torch."), sha256(value.contiguous())]
        for name, value in values.items()
    }
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.view(torch.int16).numpy().tobytes()).hexdigest()


def tidy(folder: Path) -> None:
    """Keep the configuration and the weights."""
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=2, sort_keys=True) + "\n")


TOOLS = {"llm-compressor": by_llm_compressor, "gptqmodel": by_gptqmodel, "awq": awq_by_hand}

if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in TOOLS:
        raise SystemExit(f"usage: make_quantized.py TOOL, where TOOL is one of {', '.join(TOOLS)}")
    TOOLS[sys.argv[1]]()
