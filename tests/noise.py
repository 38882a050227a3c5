"""Checkpoints with a fault of a known size."""

import shutil

import torch
from safetensors.torch import load_file, save_file


def noisy_copy(checkpoint, folder, layer, size):
    """A copy of a checkpoint with :func:`with_noise`."""
    shutil.copytree(checkpoint, folder)
    weights = with_noise(load_file(folder / "model.safetensors"), layer, size)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_noise(weights, layer, size):
    """Add noise of ``size`` times their deviation to the rows of q and gate of one layer, rounded to bfloat16."""
    chance, weights = torch.Generator().manual_seed(0), dict(weights)
    for name in (
        f"model.layers.{layer}.self_attn.q_proj.weight",
        f"model.layers.{layer}.mlp.gate_up_proj.weight",
    ):
        whole = weights[name].float()
        rows = whole[: len(whole) // 2] if "gate_up" in name else whole
        rows += size * rows.std() * torch.randn(rows.shape, generator=chance)
        weights[name] = whole.bfloat16()
    return weights
