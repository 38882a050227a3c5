"""Estimates the peak memory of a comparison from shapes, to refuse it before the work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from glm4_exporters.architecture import expected_tensors
from glm4_exporters.config import Glm4Config
from glm4_exporters.pieces import HEAD_ROWS
from glm4_runtime.errors import RequestError

INTERPRETER = 520 << 20  # Python with torch, onnx and onnxruntime, and the memory that their allocators keep
SCORES_COPIES = 4  # scores, masked scores, softmax and its copy, in float32
MLP_COPIES = 6  # gate and up, their halves, silu, product
# Bytes per element of a weight while ONNX Runtime opens its graph: read, joined, widened and packed.
BYTES_PER_WEIGHT = 14
HELD_VALUES = (
    6  # hidden-sized values per position that a bundle's walk keeps; the same number for the reference
)
# A matrix of the graph is read by probing inputs: its compared rows, and the probe's inputs and outputs at a time.
MOST_ROWS = 8192  # then the standard error of a column is a ninetieth of its rest
VALUES_AT_ONCE = 1 << 24
LOGITS_COPIES = 3  # blocks of the head, joined, and their float64 parts
LOGITS_BUDGET = 256 << 20  # bytes of one copy of the logits at a time


@dataclass(frozen=True)
class Work:
    """The size of a comparison: lengths of the sequences, number of bundles, and whether taps are compared."""

    lengths: Sequence[int]
    bundles: int
    layers: bool

    @property
    def positions(self) -> int:
        return sum(self.lengths)


def chunk_of_positions(config: Glm4Config) -> int:
    """Number of positions whose logits are in memory together."""
    return max(16, min(1024, LOGITS_BUDGET // (4 * config.vocab_size)))


def estimate(config: Glm4Config, task: str, work: Work) -> dict[str, int]:
    """Bytes by stage of the comparison; each includes the memory that stays occupied throughout."""
    hidden, width = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sides = 1 + work.bundles
    kept = INTERPRETER + 4 * hidden * work.positions * (1 + HELD_VALUES * (work.bundles + work.layers))

    shapes = {n: s for n, s in expected_tensors(config, task).items() if n.startswith("model.layers.0.")}
    layer = sum(math.prod(shape) for shape in shapes.values())
    largest = max(math.prod(shape) for shape in shapes.values())
    longest = max(work.lengths)
    activations = 4 * longest * (MLP_COPIES * width + 4 * hidden + 3 * (queries + 2 * keys))
    activations += 4 * SCORES_COPIES * config.num_attention_heads * longest**2

    tapped = 4 * work.positions * (8 * hidden + 2 * queries + 2 * keys + width)  # all taps of a layer
    block = 4 * work.positions * width * 2 * (1 + work.layers)
    probe = (4 * min(MOST_ROWS, hidden) * width + 3 * 4 * VALUES_AT_ONCE) * work.layers
    positions = min(chunk_of_positions(config), work.positions)
    head = BYTES_PER_WEIGHT * min(HEAD_ROWS, config.vocab_size) * hidden
    logits = 4 * positions * config.vocab_size * (LOGITS_COPIES + sides + work.layers)
    return {
        "the reference's layers": kept + 4 * layer + 8 * largest + activations + tapped * work.layers,
        "the bundle's layers": kept
        + 4 * layer
        + BYTES_PER_WEIGHT * largest
        + activations
        + block
        + probe
        + tapped * work.layers,
        "the logits": kept + head + logits if task == "causal-lm" else kept,
    }


def require_memory(config: Glm4Config, task: str, work: Work, available: int) -> int:
    """Estimate the peak in bytes, and refuse it if it is too high.

    Raises:
        RequestError: it is more than ``available``; says what would fit.
    """
    stages = estimate(config, task, work)
    stage, needed = max(stages.items(), key=lambda item: item[1])
    if needed <= available:
        return needed
    fewer = Work([min(work.lengths)], work.bundles, layers=False)
    least = max(estimate(config, task, fewer).values())
    advice = (
        "compare fewer tokens (--max-tokens), shorter sequences (--length) or leave out --layers or --against"
        if least <= available
        else "no choice of text fits; take a machine with more"
    )
    raise RequestError(
        f"the comparison takes {needed / 2**30:.1f} GiB at its peak ({stage}) and {available / 2**30:.1f} GiB "
        f"may be used; {advice}"
    )
