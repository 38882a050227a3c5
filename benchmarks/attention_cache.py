"""Time of target cpu's attention operator by type of the KV cache, on one thread.

    python -m benchmarks.attention_cache --out benchmarks/results/attention-cache.json

One layer of the 9B: 32 query heads, 2 key heads of 128 channels. The types take turns in each round, and float32 runs
twice (``float32 again``): the ratio of the two shows the noise.
"""

import ctypes
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from benchmarks.peers.__main__ import processor
from glm4_plugins.block_product import library

HEADS, KV_HEADS, DIM, ROTARY = 32, 2, 128, 64
CACHES = {"float32": (0, 4 * DIM), "float16": (1, 2 * DIM), "bfloat16": (2, 2 * DIM), "int8": (3, DIM + 4)}
AGAIN = "float32 again"
# New positions, past positions, sequences.
CASES = ((1, 4096, 4), (1, 16384, 1), (1, 32768, 1), (512, 3584, 1), (512, 15872, 1))


def step(cache: str, case: tuple[int, int, int]) -> Callable[[], None]:
    """A run of the operator over a random cache. No number of a cache is NaN or infinite."""
    sequence, past, batch = case
    kind, row_bytes = CACHES[cache]
    capacity, draw = past + sequence, np.random.default_rng(0)

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return draw.standard_normal(shape, np.float32)

    def rows() -> npt.NDArray[np.uint8]:
        count = batch * KV_HEADS * capacity
        if cache == "int8":
            numbers = draw.integers(-127, 128, (count, DIM), np.int8).view(np.uint8)
            return np.concatenate([numbers, np.full((count, 1), 0.01, np.float32).view(np.uint8)], 1)
        x = normal(count, DIM)
        halves = x.view(np.uint32) >> 16  # bfloat16
        stored = {"float16": x.astype(np.float16), "bfloat16": halves.astype(np.uint16)}
        return np.asarray(stored.get(cache, x)).view(np.uint8).reshape(count, row_bytes)

    sizes = [batch, sequence, capacity, KV_HEADS, HEADS // KV_HEADS, DIM, ROTARY, capacity]
    angles = np.arange(capacity)[:, None] * 10000.0 ** (-np.arange(0, ROTARY, 2) / ROTARY)
    arrays = [
        normal(batch, sequence, HEADS * DIM), normal(batch, sequence, KV_HEADS * DIM),
        normal(batch, sequence, KV_HEADS * DIM), rows(), rows(),
        np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32),
        np.full(batch, past, np.int32), np.full(batch, sequence, np.int32), None,
        np.empty((batch, sequence, HEADS * DIM), np.float32),
    ]  # fmt: skip
    counts = np.array(sizes, np.int64)
    function = ctypes.CDLL(str(library())).glm4_attention
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_char_p, pointer, ctypes.c_int, ctypes.c_float, *[pointer] * 11]

    def run() -> None:
        places = [None if array is None else array.ctypes.data for array in arrays]
        if code := function(None, counts.ctypes.data, kind, DIM**-0.5, *places):
            raise RuntimeError(f"attention ended with {code}")

    return run


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(case: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Milliseconds by cache, and the median over the rounds of float32's time over each."""
    calls = {cache: step(cache, case) for cache in CACHES}
    calls[AGAIN] = calls["float32"]
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {cache: [] for cache in calls}
    for number in range(rounds):
        for cache in list(calls)[:: -1 if number % 2 else 1]:
            seconds[cache].append(timed(calls[cache]))
    return {
        cache: {
            "ms": round(1e3 * statistics.median(found), 3),
            "least_ms": round(1e3 * min(found), 3),
            "times_float32": round(
                statistics.median(a / b for a, b in zip(seconds["float32"], found, strict=True)), 3
            ),
        }
        for cache, found in seconds.items()
    }


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(rounds: int, out: Path) -> None:
    """Measure all cases, and write them."""
    cases = [
        {"new": case[0], "past": case[1], "sequences": case[2], "caches": measured(case, rounds)}
        for case in CASES
    ]
    about = {"date": datetime.now(UTC).date().isoformat(), "machine": processor(), "rounds": rounds}
    command = f"python -m benchmarks.attention_cache --rounds {rounds} --out {out.name}"
    out.write_text(json.dumps({**about, "command": command, "cases": cases}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
