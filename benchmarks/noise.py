"""Checkpoints with a fault of a known size: noise on the rows of q and gate of one layer.

A scale of o_proj or down_proj would be no fault: the norm behind the matrix removes the scale.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm4_exporters.config import Glm4Config
from glm4_exporters.task_models import Glm4ForCausalLM

LAYER = 1
HALVINGS = 9  # of the interval in which the size of the noise is sought
LARGEST = 4.0
Weights = Mapping[str, Tensor]


def noisy_copy(checkpoint: Path, folder: Path, layer: int, size: float) -> Path:
    """A copy of a checkpoint with :func:`with_noise`."""
    shutil.copytree(checkpoint, folder)
    weights = with_noise(load_file(folder / "model.safetensors"), layer, size)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_noise(weights: Weights, layer: int, size: float) -> dict[str, Tensor]:
    """Add noise of ``size`` times their deviation to the rows of q and gate of one layer, rounded to bfloat16."""
    chance, changed = torch.Generator().manual_seed(0), dict(weights)
    for name in (
        f"model.layers.{layer}.self_attn.q_proj.weight",
        f"model.layers.{layer}.mlp.gate_up_proj.weight",
    ):
        whole = changed[name].float()
        rows = whole[: len(whole) // 2] if "gate_up" in name else whole
        rows += size * rows.std() * torch.randn(rows.shape, generator=chance)
        changed[name] = whole.bfloat16()
    return changed


def noise_sizes(
    checkpoint: Path, texts: Sequence[Sequence[int]], divergences: Sequence[float]
) -> dict[float, float]:
    """The size of the noise for each mean KL divergence from the checkpoint, in nats, over all positions of token ids."""
    rows, weights = [torch.tensor([list(ids)]) for ids in texts], load_file(checkpoint / "model.safetensors")
    expected = [_log_probabilities(_loaded(checkpoint, weights), row) for row in rows]

    def mean_kl(size: float) -> float:
        model = _loaded(checkpoint, with_noise(weights, LAYER, size))
        each = [
            (p.exp() * (p - _log_probabilities(model, row))).sum(-1)
            for p, row in zip(expected, rows, strict=True)
        ]
        return float(torch.cat(each, 1).mean())

    return {kl: _bisected(mean_kl, kl) for kl in divergences}


def _bisected(function: Callable[[float], float], wanted: float) -> float:
    low, high = 0.0, LARGEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < wanted else (low, middle)
    return (low + high) / 2


def _loaded(checkpoint: Path, weights: Weights) -> Glm4ForCausalLM:
    model = Glm4ForCausalLM(Glm4Config.from_dict(json.loads((checkpoint / "config.json").read_text("utf-8"))))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()


@torch.no_grad()
def _log_probabilities(model: Glm4ForCausalLM, row: Tensor) -> Tensor:
    logits = model(row).logits
    assert logits is not None
    return torch.log_softmax(logits, -1)
