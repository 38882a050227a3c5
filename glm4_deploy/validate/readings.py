"""What a graph's sub-blocks should read and give: the reference's values, in the graph's own scale.

An export may multiply what a sub-block gives by a factor per channel and divide the columns of the matrix that
reads it: by a power of two for float16's range, by AWQ's or SmoothQuant's scales. Such a graph is right, and is
compared in its own scale. A factor that the reader does not undo is an error of the sub-block.

So there are two readings of the reference's values as soon as a factor explains a sub-block's error: as they are, and
multiplied by the factor. The reader runs on both, and the reading under which the reader errs less is the right one. A
reader that is wrong by both decides nothing: then it is the reading that blames fewer sub-blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_deploy.validate.bands import BANDS, is_out_of_band
from glm4_deploy.validate.drift import BlockError, compare
from glm4_deploy.validate.taps import ATTENTION_TAP, HEAD_TAP, NORM_TAP, GraphTap
from glm4_exporters.config import Glm4Config

Array = npt.NDArray[Any]
Values = dict[str, Array]
Factor = npt.NDArray[np.float32]  # [channels]

# A sub-block whose channels an export may scale, and the first one behind it that undoes the factor.
READER = {
    "input_layernorm": "qk",
    "v": "o_proj",
    "post_attention_layernorm": "gate_up",
    "gate_up": "down",
    NORM_TAP: HEAD_TAP,
}
WORTH = 0.25  # of its band: a smaller error needs no explanation
EXPLAINED = 0.7  # of the error: a factor that leaves more does not explain it
SHARED = 1.5  # times the error under a factor per channel: a shared power of two explains as much
MOST_BITS = 60  # of a shared power of two, so that float32 holds it and what it multiplies
FAR = 2  # powers of two: values that are so much larger or smaller are scaled, even if they are wrong besides


@dataclass(frozen=True)
class Block:
    """One sub-block of a graph, and the reference's values of it: per sequence, one array per value of the tap."""

    layer: int | None
    tap: GraphTap
    arithmetic: str
    reference: Sequence[tuple[Array, ...]]


@dataclass
class Reading:
    """The reference's values in one scale, since the sub-block that may be scaled.

    Attributes:
        values: by the graph's names, per sequence, beside those on which all readings agree.
        errors: of the sub-blocks by this reading.
        factor: what the values of that sub-block are multiplied by; None: they are as they are.
    """

    values: list[Values]
    errors: list[BlockError] = field(default_factory=list)
    factor: Factor | None = None

    @property
    def size(self) -> float:
        """The own error of the last sub-block; infinite where it is no number."""
        local = self.errors[-1].local
        return local.relative if local is not None and math.isfinite(local.relative) else math.inf


class Readings:
    """All readings of the reference's values at one place of a graph, one or two.

    Attributes:
        known: the values on which all readings agree, by the graph's names, per sequence.
        open: the readings among which the next reader decides.
    """

    def __init__(self, config: Glm4Config, sequences: int) -> None:
        self._config = config
        self._reader: str | None = None
        self._errors: list[BlockError] = []
        self.known: list[Values] = [{} for _ in range(sequences)]
        self.open = [Reading([{} for _ in range(sequences)])]

    def inputs(self, reading: Reading) -> list[Values]:
        """Everything known of each sequence, by one reading."""
        return [{**known, **own} for known, own in zip(self.known, reading.values, strict=True)]

    def add(self, block: Block, own: Sequence[Values], found: Sequence[Sequence[Values]]) -> None:
        """Compare what a sub-block gave.

        Args:
            own: on what the bundle itself made before, per sequence.
            found: on the :meth:`inputs` of each open reading, per sequence.
        """
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # a value beyond float16 is infinite, and so its error
            branches = [
                self._branch(block, reading, own, one) for reading, one in zip(self.open, found, strict=True)
            ]
        if self._reader not in (None, block.tap.tap):
            for reading, (only, *_) in zip(self.open, branches, strict=True):
                _extend(reading, only)
            return
        reading, branch = self._choose(branches)
        self.settle(reading)
        self.open = branch
        self._reader = READER[block.tap.tap] if len(self.open) > 1 else None
        if self._reader is None:
            self.settle(self.open[0])

    def _choose(self, branches: Sequence[list[Reading]]) -> tuple[Reading, list[Reading]]:
        """A reading, and what the reader gives by it: as it is and perhaps scaled."""

        def fits(pair: tuple[Reading, list[Reading]]) -> Reading:
            return min(pair[1], key=lambda one: one.size)

        pairs = list(zip(self.open, branches, strict=True))
        best = min(pairs, key=lambda pair: fits(pair).size)
        if not is_out_of_band(fits(best).errors[-1]):
            return best
        return min(pairs, key=lambda pair: (sum(map(is_out_of_band, pair[0].errors)), fits(pair).size))

    def settle(self, reading: Reading) -> None:
        """Take one reading for the right one."""
        self._errors += reading.errors
        for known, new in zip(self.known, reading.values, strict=True):
            known.update(new)
        self.open, self._reader = [Reading([{} for _ in self.known])], None

    def errors(self) -> list[BlockError]:
        """Those of all sub-blocks on which a reading is chosen, once."""
        found, self._errors = self._errors, []
        return found

    def forget(self, name: str) -> None:
        """Drop a value that no later sub-block reads."""
        for values in (self.known, *(reading.values for reading in self.open)):
            for one in values:
                one.pop(name, None)

    def _branch(
        self, block: Block, reading: Reading, own: Sequence[Values], found: Sequence[Values]
    ) -> list[Reading]:
        """A sub-block by one reading: its values as they are and, where that explains its error, scaled."""
        factor = None
        if block.tap.tap == ATTENTION_TAP and reading.factor is not None:
            factor = passed_on(reading.factor, self._config)
        plain = _measured(block, factor, own, found)
        if block.tap.tap not in READER or plain.size < WORTH * BANDS[block.arithmetic].local:
            return [plain]
        name = block.tap.values[0]
        each, shared = factors([one[0] for one in block.reference], [one[name] for one in found])
        scaled, simple = (_measured(block, one, own, found) for one in (each, shared))
        best = simple if simple.size <= SHARED * scaled.size else scaled
        is_far = abs(math.log2(float(shared[0]))) >= FAR
        return [plain, best] if is_far or best.size < EXPLAINED * plain.size else [plain]


def factors(reference: Sequence[Array], found: Sequence[Array]) -> tuple[Factor, Factor]:
    """Factors between the reference's values [..., channels] and those found.

    Returns:
        The least-squares factor of each channel, and the power of two nearest to most channels' ratio of sizes.
    """
    across, square, size = (np.zeros(reference[0].shape[-1]) for _ in range(3))
    for one, other in zip(reference, found, strict=True):
        x, y = (array.reshape(-1, one.shape[-1]).astype(np.float64) for array in (one, other))
        across += (x * y).sum(0)
        square += (x * x).sum(0)
        size += (y * y).sum(0)
    seen = square > 0
    each = np.where(seen, across / np.where(seen, square, 1), 1).astype(np.float32)
    middle = float(np.median(np.sqrt(size[seen] / square[seen]))) if seen.any() else 1.0
    middle = 1.0 if math.isnan(middle) else middle  # a sub-block that gave NaN has no scale
    middle = min(max(middle, 2.0**-MOST_BITS), 2.0**MOST_BITS)
    shared = 2.0 ** round(math.log2(middle))
    return each, np.full_like(each, shared)


def passed_on(factor: Factor, config: Glm4Config) -> Factor:
    """A factor of the values [Hkv * D] as attention's output [H * D] has it."""
    group = config.num_attention_heads // config.num_key_value_heads
    return np.repeat(factor.reshape(-1, config.head_dim), group, axis=0).reshape(-1)


def _measured(block: Block, factor: Factor | None, own: Sequence[Values], found: Sequence[Values]) -> Reading:
    wanted = [_in_graph(block.tap, one, factor, own[0]) for one in block.reference]
    drift, local = compare(wanted, own), compare(wanted, found)
    error = BlockError(block.layer, block.tap.tap, block.tap.covers, block.arithmetic, drift, local)
    return Reading(wanted, [error], factor)


def _in_graph(tap: GraphTap, arrays: Sequence[Array], factor: Factor | None, like: Values) -> Values:
    """The reference's values by the graph's names, in its types and of its scale."""
    scale = np.float32(2.0**-tap.bits) if factor is None else factor * np.float32(2.0**-tap.bits)
    scaled = arrays if factor is None and not tap.bits else [array * scale for array in arrays]
    return {
        name: array.astype(like[name].dtype, copy=False)
        for name, array in zip(tap.values, scaled, strict=True)
    }


def _extend(reading: Reading, new: Reading) -> None:
    reading.errors += new.errors
    for known, values in zip(reading.values, new.values, strict=True):
        known.update(values)
