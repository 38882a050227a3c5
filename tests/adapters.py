"""LoRA adapters as PEFT saves them, with random weights that matter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

MODELS = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
}


def write_adapter(
    base: Path, folder: Path, *, seed: int = 0, task: str = "causal-lm", **options: Any
) -> Path:
    """Make an adapter of ``base`` with PEFT's options, and random matrices where training would put them."""
    model = base_model(base, torch.float32, task, **{"num_labels": options.pop("num_labels", 2)})
    adapted = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **options})
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_magnitude" in name:
                weight.mul_(1 + 0.1 * torch.rand(weight.shape, generator=generator))
            elif "lora_" in name or "modules_to_save" in name or weight.requires_grad:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    return folder


def base_model(base: Path, dtype: torch.dtype, task: str = "causal-lm", **options: Any) -> torch.nn.Module:
    more = options if task != "causal-lm" else {}
    return MODELS[task].from_pretrained(base, dtype=dtype, **more)


def merged_weights(
    base: Path, folders: list[tuple[Path, float]], dtype: torch.dtype, task: str = "causal-lm", **options: Any
) -> dict[str, torch.Tensor]:
    """What PEFT's own ``merge_and_unload`` makes of the model's weights, one adapter after the other."""
    model = base_model(base, dtype, task, **options)
    for folder, scale in folders:
        adapted = PeftModel.from_pretrained(model, str(folder))
        for module in adapted.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling = {name: value * scale for name, value in module.scaling.items()}
        model = adapted.merge_and_unload()
    return {name: weight.detach() for name, weight in model.state_dict().items()}


def rewrite(
    folder: Path, tensors: Callable[[dict[str, Any]], dict[str, Any]] | None = None, **config: Any
) -> None:
    """Change an adapter's tensors, or options of its configuration; an option of None is removed."""
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    if tensors is not None:
        weights = folder / "adapter_model.safetensors"
        found = tensors(load_file(weights))
        weights.unlink()
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, weights)
