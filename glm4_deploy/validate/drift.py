"""Errors of a sub-block's values against the reference's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_deploy.metrics import POSITIONS_AT_ONCE

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Error:
    """The error of values over all positions; ``worst`` is the error of the worst position.

    Relative errors are norms of the difference over norms of the reference.
    """

    relative: float
    cosine: float
    worst: float

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.relative, self.cosine, self.worst)))


@dataclass(frozen=True)
class BlockError:
    """A sub-block's errors: ``drift`` in the bundle's own run, ``local`` when it reads the reference's values."""

    layer: int | None  # None outside of the layers
    block: str
    covers: tuple[str, ...]  # sub-blocks that this graph has only together with this one
    arithmetic: str  # the coarsest number type it computes with, a key of ``bands.BANDS``
    drift: Error
    local: Error | None

    @property
    def name(self) -> str:
        where = self.block if self.layer is None else f"layer {self.layer} {self.block}"
        return f"{where} (with {', '.join(self.covers)})" if self.covers else where


def compare(wanted: Sequence[Tensors], found: Sequence[Tensors]) -> Error:
    """The error over all sequences and all values of a tap."""
    total = ErrorSum()
    for one, two in zip(wanted, found, strict=True):
        for name, array in one.items():
            total.add(array, two[name])
    return total.error()


class ErrorSum:
    """Sums the error of values that arrive in parts, in float64."""

    def __init__(self) -> None:
        self._square = self._other = self._dot = self._difference = 0.0
        self._positions: list[npt.NDArray[np.float64]] = []

    def add(self, wanted: npt.NDArray[Any], found: npt.NDArray[Any]) -> None:
        """Values [..., channels] of some positions."""
        a = wanted.reshape(-1, wanted.shape[-1])
        b = found.reshape(a.shape)
        for at in range(0, len(a), POSITIONS_AT_ONCE):
            x, y = (
                a[at : at + POSITIONS_AT_ONCE].astype(np.float64),
                b[at : at + POSITIONS_AT_ONCE].astype(np.float64),
            )
            square, difference = (x * x).sum(-1), ((y - x) ** 2).sum(-1)
            self._square += float(square.sum())
            self._other += float((y * y).sum())
            self._dot += float((x * y).sum())
            self._difference += float(difference.sum())
            self._positions.append(np.stack((difference, square)))

    def error(self) -> Error:
        """The error so far. A position whose reference is nearly zero is compared with a hundredth of the mean
        instead."""
        difference, square = np.concatenate(self._positions, axis=-1)
        floor = max(1e-4 * float(square.mean()), 1e-300)
        return Error(
            relative=math.sqrt(self._difference / max(self._square, 1e-300)),
            cosine=self._dot / max(math.sqrt(self._square * self._other), 1e-300),
            worst=math.sqrt(float((difference / np.maximum(square, floor)).max())),
        )
