"""Small random checkpoints, written as the released ones are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from glm4_exporters.architecture import expected_tensors
from glm4_exporters.config import TASK_OF_ARCHITECTURE, Glm4Config
from glm4_runtime.errors import ConfigError

ARCHITECTURE_OF_TASK = {task: name for name, task in TASK_OF_ARCHITECTURE.items()}
LABELS = {"0": "negative", "1": "neutral", "2": "positive"}


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A ``config.json`` of the released checkpoints' form, two layers deep; an override of None removes a key."""
    config = {
        "architectures": ["Glm4ForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [1, 2, 3],
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "model_type": "glm4",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 320,
    }
    return {key: value for key, value in (config | overrides).items() if value is not None}


def parse_config(**overrides: Any) -> Glm4Config:
    """The configuration of :func:`tiny_config`."""
    return Glm4Config.from_dict(tiny_config(**overrides))


def config_refusal(**overrides: Any) -> str:
    """The one-line error of a wrong configuration."""
    with pytest.raises(ConfigError) as caught:
        parse_config(**overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_checkpoint(
    folder: str | Path,
    config: dict[str, Any],
    *,
    dtype: str = "float32",
    seed: int = 0,
    shards: int = 1,
    task: str = "causal-lm",
) -> Path:
    """Write a random checkpoint: norms near 1, biases that matter, matrices that keep activations near 1.

    ``config`` is written with the architecture of ``task``, three labels where it needs some and names
    none, and ``dtype``. An encoder's tensors lack the ``model.`` of the others, as transformers saves it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config | {"architectures": [ARCHITECTURE_OF_TASK[task]], "torch_dtype": dtype}
    if task.endswith("classification") and not {"id2label", "num_labels"} & config.keys():
        config["id2label"] = LABELS
    tensors = random_tensors(Glm4Config.from_dict(config), task, getattr(torch, dtype), seed)
    _write_json(folder / "config.json", config)
    if task == "causal-lm":
        kept = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(folder / "generation_config.json", {key: config[key] for key in kept if key in config})
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    names = list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    return folder


def random_tensors(config: Glm4Config, task: str, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, by the names it would give them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config, task).items():
        tensor = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensor = 1 + 0.1 * tensor
        elif name.endswith("bias"):
            tensor = 0.2 * tensor
        elif "embed_tokens" not in name:
            tensor = tensor / shape[1] ** 0.5
        own_name = name.removeprefix("model.") if task == "encoder" else name
        tensors[own_name] = tensor.to(dtype)
    return tensors


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
