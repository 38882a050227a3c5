"""How long the attention kernel should take on a GPU that is not here: estimates, not measurements.

    python -m benchmarks.attention_estimate --out benchmarks/results/attention-estimate

The kernel is compiled for the case at hand, and its machine code walked by a model of one processor
(:mod:`benchmarks.sm_walk`), from a block's first instruction to its last. Launching is not part of the estimate.
Inputs: bytes of the cache, operations, registers, shared memory, the instructions themselves, the number of
processors, and the rates of copies and products measured on the device. Only a difference between two kernels
means something: the model leaves out more than it holds.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from benchmarks.sass import instructions
from benchmarks.sm_walk import GPUS, WARP, Gpu, Walk, Work
from glm4_plugins.compile import CompiledKernel, compile_kernel, disassembled, signature
from glm4_plugins.launch import KernelShape, Share, choices, share

WIDTHS = {"fp16": 2, "bf16": 2}  # bytes; any other cache has one a number
LAYERS = 40  # of a 9B


@dataclass(frozen=True)
class Case:
    """``batch`` sequences of ``past`` cached keys and ``new`` tokens each, on the heads of a 9B."""

    batch: int
    past: int
    new: int
    cache: str = "fp16"
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 128

    @property
    def shape(self) -> KernelShape:
        scale, quantized = self.head_dim**-0.5, self.cache not in WIDTHS
        return KernelShape(
            self.heads, self.kv_heads, self.head_dim, scale, self.batch, quantized_cache=quantized
        )

    @property
    def key_bytes(self) -> int:
        """Of one key and its value, in one head."""
        return 2 * self.head_dim * WIDTHS.get(self.cache, 1)

    @property
    def cache_bytes(self) -> int:
        return self.batch * self.kv_heads * self.past * self.key_bytes

    @property
    def operations(self) -> int:
        pairs = self.new * self.past + self.new * (self.new + 1) // 2
        return 4 * self.batch * self.heads * pairs * self.head_dim


CASES = (
    *(Case(batch, past, 1) for batch, past in ((8, 8192), (8, 32768), (1, 8192), (1, 32768), (32, 4096))),
    *(Case(batch, past, 1, "int8") for batch, past in ((8, 8192), (8, 32768), (1, 8192))),
    *(Case(1, 32768, new) for new in (2, 4, 8, 16, 32, 64, 512)),
    *(Case(1, 0, new) for new in (512, 4096, 32768)),
)


@dataclass(frozen=True)
class Estimate:
    """Of one case: microseconds of a layer, and shares of the measured rates."""

    case: Case
    share: Share
    microseconds: float
    of_copy: float
    of_products: float
    registers: int
    spilled: int
    shared_memory: int
    instructions: int
    tile_cycles: int


def estimate(case: Case, gpu: Gpu) -> Estimate:
    """One case on one GPU, with the block sizes that are tried first."""
    tiles = choices(gpu.capability, case.shape.quantized_cache)[0]
    part = share(case.shape, tiles, (case.past,) * case.batch, case.new)
    shape = replace(case.shape, phase=part.phase)
    kernel = compile_kernel(shape, tiles, gpu.capability)
    code = instructions(disassembled(kernel.ptx, gpu.capability))

    def walked(part: Share) -> Walk:
        pieces = 4 * part.rows * case.head_dim
        work = Work(part, case.cache_bytes, part.keys * case.key_bytes, pieces)
        return Walk(gpu, parameters(shape, gpu), tiles.warps, work, code)

    longest = walked(part)
    # Of more blocks than fit at once, each processor gets several, and the long ones come first.
    rounds = part.blocks / (gpu.processors * resident(kernel, gpu))
    mean = walked(replace(part, new_tiles=part.mean_new_tiles)) if rounds > 1 else longest
    seconds = max(longest.now, rounds * mean.now) / gpu.clock
    return Estimate(
        case,
        part,
        round(1e6 * seconds, 2),
        round(case.cache_bytes / seconds / gpu.copy, 3),
        round(case.operations / seconds / gpu.products, 3),
        kernel.registers,
        kernel.spilled,
        kernel.shared_memory,
        len(code),
        round(longest.tile_cycles),
    )


def resident(kernel: CompiledKernel, gpu: Gpu) -> int:
    """How many blocks one processor holds at once."""
    by_registers = gpu.registers // (kernel.registers * WARP * kernel.warps)
    return max(min(by_registers, gpu.shared_memory // max(kernel.shared_memory, 1)), 1)


def parameters(shape: KernelShape, gpu: Gpu) -> dict[int, str]:
    """The kernel's arguments, by their offsets in the constant bank."""
    offset, found = gpu.first_parameter, {}
    for name, kind in signature(shape).items():
        if kind != "constexpr":
            size = 8 if kind.startswith("*") else 4
            offset = -(-offset // size) * size
            found[offset] = name
            offset += size
    return found


def table(records: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> list[str]:
    """A row per case; in brackets what an earlier kernel was estimated at."""
    then = {str(record["case"]): record for record in earlier}
    lines = [
        "| batch | past | new | cache | blocks | a layer, µs | 40 layers, ms | of copy | of products |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        case, old = record["case"], then.get(str(record["case"]))
        columns = {
            "blocks": lambda r: str(r["share"]["blocks"]),
            "us": lambda r: f"{r['microseconds']:.1f}",
            "ms": lambda r: f"{LAYERS * r['microseconds'] / 1e3:.2f}",
            "copy": lambda r: f"{100 * r['of_copy']:.0f} %",
            "products": lambda r: f"{100 * r['of_products']:.0f} %",
        }
        cells = [str(case[name]) for name in ("batch", "past", "new", "cache")]
        cells += [shown(record) + (f" ({shown(old)})" if old else "") for shown in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(gpu: Gpu, records: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> str:
    rates = f"{gpu.copy / 1e12:.1f} TB/s copied, {gpu.products / 1e12:.0f} TFLOP/s multiplied"
    beside = " In brackets: the kernel of the earlier file." if earlier else ""
    return "\n".join(
        [
            f"# Attention on one {gpu.name}: estimates, nothing here was measured on a GPU",
            "",
            f"By `benchmarks/attention_estimate.py`, for {gpu.processors} processors at {gpu.clock / 1e9:.3f} GHz, "
            f"{rates}. A layer of a 9B, from a block's first instruction to its last; launching is left out.{beside}",
            "",
            *table(records, earlier),
            "",
        ]
    )


@click.command(help=__doc__)
@click.option("--gpu", type=click.Choice(list(GPUS)), default="H100", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json and OUT.md.")
@click.option(
    "--beside", type=click.Path(path_type=Path, exists=True), help="An earlier JSON, shown in brackets."
)
def main(gpu: str, out: Path | None, beside: Path | None) -> None:
    records = [asdict(estimate(case, GPUS[gpu])) for case in CASES]
    earlier = json.loads(beside.read_text())["estimates"] if beside else []
    text = page(GPUS[gpu], records, earlier)
    click.echo(text)
    if out:
        facts = dict(kind="estimates", gpu=asdict(GPUS[gpu]), triton=version("triton"), estimates=records)
        out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
        out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
