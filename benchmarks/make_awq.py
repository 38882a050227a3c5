"""Write an AWQ checkpoint of a bf16 folder that make_checkpoint.py made: 4 bits, groups of 128, zero points.

    python benchmarks/make_checkpoint.py --size 9b-4layers /data/9b-4layers
    python benchmarks/make_awq.py /data/9b-4layers /data/9b-4layers-awq

For measurements of exports: the numbers are rounded to the nearest, without a search. Embedding, head, norms and biases
stay as they are, in float16.
"""

import json
import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from glm4_exporters.checkpoint import Checkpoint

GROUP, LEFT = 128, ["lm_head"]
PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the column at each of an int32's eight places
ROWS = 1024


def in_words(numbers: torch.Tensor) -> torch.Tensor:
    """[rows, columns] of 0 ... 15 -> int32 [rows, columns / 8] in the order that AWQ's kernels read."""
    eights = numbers.to(torch.int64).unflatten(1, (-1, 8))
    words = sum(eights[..., column] << 4 * place for place, column in enumerate(PLACES))
    return words.to(torch.int32)


def quantized(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of some rows [rows, width], each with the rows on its last axis."""
    groups = weight.float().t().unflatten(0, (-1, GROUP))  # [groups, 128, rows]
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(0, 15)
    numbers = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return {"qweight": in_words(numbers.flatten(0, 1)), "qzeros": in_words(zeros), "scales": scales}


def parts_of(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a weight in the new checkpoint, by name."""
    weight = checkpoint.read(name)
    if not name.endswith("proj.weight"):
        return {name: weight.half()}
    pieces = [quantized(weight[first : first + ROWS]) for first in range(0, len(weight), ROWS)]
    module = name.removesuffix(".weight")
    return {f"{module}.{part}": torch.cat([each[part] for each in pieces], 1) for part in pieces[0]}


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=click.Path(path_type=Path))
def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    with Checkpoint.load(source) as checkpoint:
        shards: dict[str, list[str]] = {}
        for name in checkpoint.tensors:
            place = name.split(".")[2] if ".layers." in name else name
            shards.setdefault(f"model-{place}.safetensors", []).append(name)
        weight_map = {}
        for file, names in shards.items():
            tensors = {part: value for name in names for part, value in parts_of(checkpoint, name).items()}
            save_file({name: value.contiguous() for name, value in tensors.items()}, target / file)
            weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": LEFT,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
