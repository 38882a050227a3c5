"""A stage: consecutive layers of a model with their KV cache, wherever they run.

A session of stages talks to them through this interface only. Its calls to one stage come in order. So a stage may run
in another process.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
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


class Pending(Protocol):
    """The result of a run, which may still be computed."""

    def result(self) -> Hidden:
        """Wait for the result of :meth:`Stage.run`. Raises the error of the run."""


@dataclass(frozen=True)
class Done:
    """The result of a run that has ended."""

    values: Hidden

    def result(self) -> Hidden:
        return self.values


class Stage(abc.ABC):
    """One stage. It knows rows of its cache, and neither slots nor their lengths.

    Attributes:
        layers: number of its layers.
        overlaps: whether :meth:`begin` returns at once, so that several stages compute together. The result of such
            a run stays valid.
        lost: whether the stage has died. Each call then raises :class:`LostStageError`.
    """

    layers: int
    overlaps = False
    lost = False

    def begin(self, values: "Ids | Pending", step: Step) -> Pending:
        """Begin a run, after all earlier calls.

        Args:
            values: token ids for the first stage, and for others what the stage before gave for this step. If that
                run fails, this run does not begin, and its result is the error of that run.
        """
        return Done(self.run(values if isinstance(values, np.ndarray) else values.result(), step))

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


__all__ = ["Done", "Hidden", "Pending", "Positions", "Stage", "Step", "undone"]
