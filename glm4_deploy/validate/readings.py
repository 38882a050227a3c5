"""The expected inputs and outputs of a graph's sub-blocks: the reference's values in the graph's scale.

An export may multiply a sub-block's output by a factor per channel, and divide the columns of the next matrix by the
same factor. The factor is a power of two for float16's range, or a scale of AWQ or SmoothQuant. Such a graph is right
and must be compared in its own scale. The weights of the next matrix decide: a factor that they do not undo is an error
of the sub-block. :mod:`factors` has the measurements and their errors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_deploy.validate.bands import BANDS
from glm4_deploy.validate.drift import BlockError, compare
from glm4_deploy.validate.factors import Factor, Undone, expected_factor, found_factors, passed_on
from glm4_deploy.validate.readers import READERS
from glm4_deploy.validate.taps import ATTENTION_TAP, GraphTap
from glm4_exporters.config import Glm4Config

Array = npt.NDArray[Any]
Values = dict[str, Array]

WORTH = 0.25  # share of the band; a factor is looked for only for larger errors
SHARED = 1.5  # a shared power of two is preferred up to this multiple of the per-channel error


@dataclass(frozen=True)
class Block:
    """One sub-block of a graph, and the reference's output: per sequence, one array for each value of the tap."""

    layer: int | None
    tap: GraphTap
    arithmetic: str
    reference: Sequence[tuple[Array, ...]]


@dataclass(frozen=True)
class _Measured:
    """The reference's values in one scale, per sequence, and the sub-block's error against them."""

    values: list[Values]
    error: BlockError

    @property
    def size(self) -> float:
        """The sub-block's own relative error. Infinite if the error is NaN."""
        local = self.error.local
        return local.relative if local is not None and local.finite else float("inf")


class Readings:
    """The reference's values in the graph's scale, up to the current sub-block.

    Attributes:
        known: the values, by the graph's names, one dict per sequence.
    """

    def __init__(
        self,
        config: Glm4Config,
        sequences: int,
        undone: Callable[[int | None, str, Sequence[Array]], list[Undone]],
    ) -> None:
        """``undone`` measures, for a layer, a sub-block and its output in the graph, what the next matrices undo."""
        self._config, self._undone = config, undone
        self._of_values: Factor | None = None  # of the layer's v, until attention has passed it on
        self.known: list[Values] = [{} for _ in range(sequences)]

    def add(self, block: Block, own: Sequence[Values], found: Sequence[Values]) -> BlockError:
        """Compare the output of a sub-block with the reference; returns the errors.

        Args:
            own: output in the whole bundle, from the bundle's own earlier values; one dict per sequence.
            found: output from the :attr:`known` values; one dict per sequence.
        """
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # values beyond float16 become infinite, the error too
            measured = self._measure(block, own, found)
        for known, new in zip(self.known, measured.values, strict=True):
            known.update(new)
        return measured.error

    def forget(self, name: str) -> None:
        """Drop a value that no later sub-block needs."""
        for known in self.known:
            known.pop(name, None)

    def _measure(self, block: Block, own: Sequence[Values], found: Sequence[Values]) -> _Measured:
        factor = None
        if block.tap.tap == ATTENTION_TAP and self._of_values is not None:
            factor, self._of_values = passed_on(self._of_values, self._config), None
        plain = _measured(block, factor, own, found)
        if block.tap.tap not in READERS or plain.size < WORTH * BANDS[block.arithmetic].local:
            return plain
        factor = self._factor(block, own, found)
        if factor is None:
            return plain
        if block.tap.tap == "v":
            self._of_values = factor
        return _measured(block, factor, own, found)

    def _factor(self, block: Block, own: Sequence[Values], found: Sequence[Values]) -> Factor | None:
        """The factor that the graph's scale has; None if no matrix can be measured that would undo a factor."""
        name = block.tap.values[0]
        outputs = [one[name] for one in found]
        readers = self._undone(block.layer, block.tap.tap, outputs)
        if not readers:
            return None
        each, shared = found_factors([one[0] for one in block.reference], outputs)
        scaled, simple = (_measured(block, one, own, found) for one in (each, shared))
        best = shared if simple.size <= SHARED * scaled.size else each
        return expected_factor(
            best, readers, BANDS[block.arithmetic].local, block.tap.tap in ("v", "gate_up")
        )


def _measured(
    block: Block, factor: Factor | None, own: Sequence[Values], found: Sequence[Values]
) -> _Measured:
    wanted = [_in_graph(block.tap, one, factor, own[0]) for one in block.reference]
    drift, local = compare(wanted, own), compare(wanted, found)
    return _Measured(
        wanted, BlockError(block.layer, block.tap.tap, block.tap.covers, block.arithmetic, drift, local)
    )


def _in_graph(tap: GraphTap, arrays: Sequence[Array], factor: Factor | None, like: Values) -> Values:
    """The reference's values by the graph's names, in the graph's element types and scale."""
    scale = np.float32(2.0**-tap.bits) if factor is None else factor * np.float32(2.0**-tap.bits)
    scaled = arrays if factor is None and not tap.bits else [array * scale for array in arrays]
    return {
        name: array.astype(like[name].dtype, copy=False)
        for name, array in zip(tap.values, scaled, strict=True)
    }
