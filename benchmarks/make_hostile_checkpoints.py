"""Two checkpoints that compute what a given one computes, and that careless quantization gets wrong.

    python benchmarks/make_hostile_checkpoints.py demo/glm4-tiny /tmp/hostile

writes ``outliers``: a few channels of each half's input norm are x64, and the columns that read them / 64.
The function is the same to the bit, and rounding activations per token to 8 bits, or weights in blocks to
4, loses what the other channels say. And ``overflow``: down_proj of one layer is x2^12, which the norm
behind it undoes but for its eps, and which leaves float16's range on ordinary text.

For small checkpoints: the tensors are held in memory.
"""

import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.bundle.file_names import CONFIG, SAFETENSORS
from glm4_runtime.errors import Glm4Error

OUTLIERS, OUTLIER_FACTOR = 4, 64.0
OVERFLOW_LAYER, OVERFLOW_BITS = 0, 12
SEED = 0

Tensors = dict[str, Tensor]

# An input norm of each half, and what reads it.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_up_proj",),
}


def plant_outliers(
    tensors: Tensors, layers: int, channels: int = OUTLIERS, factor: float = OUTLIER_FACTOR
) -> None:
    """Multiply random channels of every input norm by ``factor``, a power of two, and divide their columns."""
    generator = torch.Generator().manual_seed(SEED)
    for index in range(layers):
        for norm, readers in READERS.items():
            weight = tensors[f"model.layers.{index}.{norm}.weight"]
            chosen = torch.randperm(len(weight), generator=generator)[:channels]
            weight[chosen] *= factor
            for reader in readers:
                tensors[f"model.layers.{index}.{reader}.weight"][:, chosen] /= factor


def raise_down_proj(tensors: Tensors, layer: int = OVERFLOW_LAYER, bits: int = OVERFLOW_BITS) -> None:
    """Multiply one layer's down_proj by 2^bits."""
    tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= 2.0**bits


def write_outliers(source: str | Path, folder: str | Path) -> Path:
    """A copy of the checkpoint ``source`` with planted outliers."""
    tensors, layers = _read(source)
    plant_outliers(tensors, layers)
    return _write(source, folder, tensors)


def write_overflow(source: str | Path, folder: str | Path, layer: int = OVERFLOW_LAYER) -> Path:
    """A copy of the checkpoint ``source`` whose down_proj overflows in ``layer``."""
    tensors, _ = _read(source)
    raise_down_proj(tensors, layer)
    return _write(source, folder, tensors)


def _read(source: str | Path) -> tuple[Tensors, int]:
    with Checkpoint.load(source, "causal-lm") as checkpoint:
        return {
            name: checkpoint.read(name) for name in checkpoint.tensors
        }, checkpoint.config.num_hidden_layers


def _write(source: str | Path, folder: str | Path, tensors: Tensors) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True)
    with Checkpoint.load(source, "causal-lm") as checkpoint:
        files = checkpoint.side_files()
    for path in (Path(source) / CONFIG, *files.values()):
        shutil.copy(path, folder)
    save_file(tensors, folder / SAFETENSORS, metadata={"format": "pt"})
    return folder


@click.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--layer", type=click.IntRange(0), default=OVERFLOW_LAYER, show_default=True, help="To overflow."
)
def main(source: Path, folder: Path, layer: int) -> None:
    """Write FOLDER/outliers and FOLDER/overflow from the checkpoint SOURCE."""
    for name in ("outliers", "overflow"):
        if (folder / name).exists():
            raise click.ClickException(f"{folder / name} exists; choose another folder")
    try:
        with Checkpoint.load(source, "causal-lm") as checkpoint:
            layers = checkpoint.config.num_hidden_layers
        if layer >= layers:
            raise click.ClickException(
                f"{source} has the layers 0 ... {layers - 1}; --layer cannot be {layer}"
            )
        print(write_outliers(source, folder / "outliers"))
        print(write_overflow(source, folder / "overflow", layer))
    except Glm4Error as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
