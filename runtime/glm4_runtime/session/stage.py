"""A stage: consecutive layers of a model with their KV cache, wherever they run.

A session of stages talks to them through this interface only. Its calls to one stage come in order. So a stage may run
in another process.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from glm4_runtime.arrays import Ids
from glm4_runtime.kv_cache import Move

Hidden = npt.NDArray[Any]  # [rows, width, hidden], float32 or float16

Positions = npt.NDArray[Any]  # keys and values of the stage's layers, [2 * layers, Hkv, positions, D]


@dataclass(frozen=True)
class Step:
    """The numbers of one run that all stages share.

    Attributes:
        first_row: of the cache; the run takes this row and the next ones.
        past: positions that each row holds before the run.
        logits_indices: int64 [rows, positions], the positions whose logits the last stage gives.
    """

    first_row: int
    past: Sequence[int]
    logits_indices: Ids


class Stage(abc.ABC):
    """One stage. It knows rows of its cache, and neither slots nor their lengths.

    Attributes:
        layers: number of its layers.
    """

    layers: int

    @abc.abstractmethod
    def run(self, values: Ids | Hidden, step: Step) -> Hidden:
        """Run new positions, and write their keys and values into the cache.

        Args:
            values: token ids int64 [rows, width] for the first stage, hidden states [rows, width, hidden] for others.

        Returns:
            Hidden states [rows, width, hidden], or from the last stage logits float32 [rows, positions, vocab]. The
            next run may overwrite them.
        """

    @abc.abstractmethod
    def move(self, move: Move) -> None:
        """Copy or swap rows of the cache. If it raises MemoryError, nothing has changed."""

    @abc.abstractmethod
    def clear(self, row: int) -> None:
        """Set a row of the cache to zeros."""

    @abc.abstractmethod
    def resize(self, capacity: int, used: int) -> None:
        """Give every row ``capacity`` positions; the first ``used`` keep their contents. If it raises MemoryError,
        nothing has changed."""

    @abc.abstractmethod
    def read(self, row: int, start: int, stop: int) -> Positions:
        """Copy positions ``start`` ... ``stop`` - 1 of a row."""

    @abc.abstractmethod
    def write(self, row: int, start: int, block: Positions) -> None:
        """Write positions from ``start`` on, as :meth:`read` gave them."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free memory and threads."""


def undone(move: Move) -> Move:
    """The move that undoes a swap."""
    return Move(move.source, move.target, move.swapped_length, move.length)


__all__ = ["Hidden", "Positions", "Stage", "Step", "undone"]
