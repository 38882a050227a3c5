"""Write a random checkpoint of a released model's size, shard by shard, in little memory.

    python benchmarks/make_checkpoint.py --size 9b-4layers /tmp/9b-4layers

For measurements, where the weights' size matters and what the model says does not. ``--sparse`` writes
the same headers over zeros that take no room on the disk, for what never reads a weight. ``--tokenizer`` takes the
tokenizer and the vocabulary of another checkpoint, for benchmarks that send texts.
"""

import json
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from glm4_exporters.architecture import expected_tensors
from glm4_exporters.config import Glm4Config

EOS = [151329, 151336, 151338]
VOCABULARY = 151552
BLOCK = 1 << 24  # random numbers, drawn once and used again from ever other places
GB = 10**9


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    bias: bool
    positions: int


SIZES = {
    "9b": Size(4096, 40, 32, 2, 13696, True, 32768),
    "9b-4layers": Size(4096, 4, 32, 2, 13696, True, 32768),
    "32b": Size(6144, 61, 48, 2, 23040, False, 32768),
    "rumination": Size(6144, 61, 48, 8, 23040, False, 131072),
}


def config_of(size: Size, layers: int | None, vocabulary: int = VOCABULARY) -> dict[str, object]:
    """The ``config.json`` of a released model, with another number of layers where one is given."""
    eos = [vocabulary - VOCABULARY + number for number in EOS]
    return {
        "architectures": ["Glm4ForCausalLM"],
        "attention_bias": size.bias,
        "attention_dropout": 0.0,
        "eos_token_id": eos,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": size.positions,
        "model_type": "glm4",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers if layers is None else layers,
        "num_key_value_heads": size.kv_heads,
        "pad_token_id": eos[0],
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocabulary,
    }


_OF_TOKENIZERS = ("vocab_size", "eos_token_id", "pad_token_id")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_tokenizer(source: Path, folder: Path) -> dict[str, object]:
    """Copy the files of a tokenizer. Returns the members of ``config.json`` that belong to its vocabulary."""
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    found = json.loads((source / "config.json").read_text("utf-8"))
    return {name: found[name] for name in _OF_TOKENIZERS}


def split_into_shards(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    """Names in order, each shard at most ``shard_bytes`` unless it holds a single tensor."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def header_of(names: list[str], shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """A safetensors header, padded to 8 bytes as the format's own writer does, and the bytes of data after it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + 2 * torch.Size(shapes[name]).numel()
        entries[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


class RandomWeights:
    """bf16 weights under which activations keep their size: norms near 1, rows of matrices of norm 1."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(BLOCK, generator=self._generator, dtype=torch.float32).bfloat16()

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The elements of one tensor in order, in 1-D pieces."""
        left = torch.Size(shape).numel()
        while left:
            # Never the same place twice, so that no two rows, layers or shards are equal.
            start = int(torch.randint(BLOCK // 2, (), generator=self._generator))
            piece = self._block[start : start + min(left, BLOCK // 2)]
            left -= len(piece)
            if "norm" in name:
                yield 1 + 0.1 * piece
            elif name.endswith("bias"):
                yield 0.2 * piece
            elif "embed_tokens" in name:
                yield piece
            else:
                yield piece * shape[1] ** -0.5


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--size", type=click.Choice(list(SIZES)), default="9b", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Layers, where not all of them.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Checkpoint, such as demo/glm4-tiny, whose tokenizer and vocabulary are taken.",
)
@click.option(
    "--vocabulary",
    type=click.IntRange(1024),
    default=VOCABULARY,
    show_default=True,
    help="Tokens. Fewer let few layers have the head's share of many.",
)
@click.option("--sparse", is_flag=True, help="Zeros that take no room on the disk.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--shard-size",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="GB per file.",
)
def main(
    folder: Path,
    size: str,
    layers: int | None,
    tokenizer: Path | None,
    vocabulary: int,
    sparse: bool,
    seed: int,
    shard_size: float,
) -> None:
    """Write a random bf16 checkpoint into FOLDER, which must be new or empty."""
    if folder.exists() and any(folder.iterdir()):
        raise click.ClickException(f"{folder} is not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(SIZES[size], layers, vocabulary)
    ends = {name: config[name] for name in ("eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", ends | {"do_sample": True})
    if tokenizer is not None:
        config |= copy_tokenizer(tokenizer, folder)
    shapes = expected_tensors(Glm4Config.from_dict(config), "causal-lm")
    shards = split_into_shards(shapes, int(shard_size * GB))
    weights = None if sparse else RandomWeights(seed)
    weight_map, total, start = {}, 0, time.monotonic()
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        header, nbytes = header_of(names, shapes)
        with (folder / file).open("wb") as stream:
            stream.write(header)
            if weights is None:
                stream.truncate(len(header) + nbytes)
            else:
                for name in names:
                    for piece in weights.blocks(name, shapes[name]):
                        stream.write(piece.view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys(names, file)
        total += nbytes
        seconds = time.monotonic() - start
        print(f"{file}: {total / GB:.1f} GB in {seconds:.0f} s", file=sys.stderr)
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    write_json(folder / "config.json", config)  # last: a folder without it is no checkpoint
    print(folder)


if __name__ == "__main__":
    main()
