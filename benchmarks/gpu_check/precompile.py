"""Kernels compiled before they are needed, several at a time: Triton keeps them on disk for this process."""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from benchmarks.gpu_check.correctness import Case
from glm4_plugins.launch import Tiles, power_of_two

WORKERS = 8  # each holds a CUDA context


def kernels_of(cases: Iterable[Case], choices: Iterable[Tiles]) -> list[tuple[Case, Tiles]]:
    """A small case for each kernel that ``cases`` need: the compiled-in batch is a power of two."""
    tiles = tuple(choices)
    small = {
        replace(case, pasts=(0,) * size, lengths=(1,) * size): None
        for case in cases
        for size in (power_of_two(len(case.lengths)),)
    }
    return [(case, one) for one in tiles for case in small]


def precompile(needed: Iterable[tuple[Case, Tiles]]) -> dict[str, Any]:
    """Launch each kernel once in one of several processes; what fails here is told by its own case later."""
    needed = list(needed)
    workers = max(1, min(WORKERS, (os.cpu_count() or 2) - 1, len(needed)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        told = list(pool.map(_launch, needed))
    return dict(kernels=len(needed), failed=[text for text in told if text], workers=workers)


def _launch(case_and_tiles: tuple[Case, Tiles]) -> str:
    from benchmarks.gpu_check.correctness import check

    try:
        check(*case_and_tiles, "cuda", repeats=1)
    except Exception as error:  # of any kind: the case itself will tell
        return f"{case_and_tiles[0]}: {type(error).__name__}: {error}"[:300]
    return ""
