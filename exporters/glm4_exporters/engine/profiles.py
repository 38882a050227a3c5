"""The ranges of input shapes for which an engine is built."""

from glm4_runtime.bundle import ENGINE, EngineProfile, Limits
from glm4_runtime.bundle.manifest_checks import CAPACITY_STEP

# Above this capacity TensorRT-RTX 1.7 has no attention kernel for exactly one query. With 4 to 48 heads of 64 and 128,
# 20480 built and 24576 did not. A profile of one or two queries uses the kernel of the prefill, at any capacity.
ONE_QUERY_CAPACITY = 16384
PREFILL_WIDTH = 512  # most new positions of one run
LOGITS_WIDTH = 128  # most positions of one run that get logits: 151552 of them in float32 take 78 MB


def engine_capacity(max_seq_len: int) -> int:
    """Positions of the cache, which TensorRT takes as a constant."""
    return -(-max_seq_len // CAPACITY_STEP) * CAPACITY_STEP


def engine_profiles(
    task: str, limits: Limits, layout: str, attention: str = "native"
) -> tuple[EngineProfile, ...]:
    """The profiles: one sequence of many positions, and for a decoder one position of many sequences.

    A prefill always has batch 1; its cache is the row of one sequence.
    """
    width, rows = min(PREFILL_WIDTH, limits.max_seq_len), limits.max_batch_size
    one = (1, 1, 1)
    short = engine_capacity(limits.max_seq_len) <= ONE_QUERY_CAPACITY
    step = one if short or attention == "plugin" else (1, 1, 2)
    if task != "causal-lm":
        whole = limits.max_seq_len
        return (EngineProfile("encode", ENGINE, 0, {"batch": one, "sequence": (1, width, whole)}),)
    prefill = {"batch": one, "sequence": (1, width, width), "positions": (1, 1, min(LOGITS_WIDTH, width))}
    decode = {"batch": (1, rows, rows), "sequence": step, "positions": one}
    names = {"prefill": prefill, "decode": decode}
    if layout == "split":
        return tuple(EngineProfile(name, f"{name}.engine", 0, axes) for name, axes in names.items())
    return tuple(EngineProfile(name, ENGINE, i, axes) for i, (name, axes) in enumerate(names.items()))
