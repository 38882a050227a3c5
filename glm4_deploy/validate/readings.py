"""The expected inputs and outputs of a graph's sub-blocks: the reference's values in the graph's scale.

An export may multiply a sub-block's output by a factor per channel, and divide the columns of the next matrix by the
same factor. The factor is a power of two for float16's range, or a scale of AWQ or SmoothQuant. Such a graph is right
and must be compared in its own scale. The "reader" is the sub-block whose matrix undoes the factor. A factor that the
reader does not undo is an error of the sub-block.

If a factor explains a sub-block's error, there are two "readings" of the reference's values: unscaled, and multiplied
by the factor. The reader runs on both readings, and the reading with the smaller error of the reader is chosen. If the
reader is out of band in both, the reading with fewer sub-blocks out of band is chosen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from glm4_deploy.validate.bands import BANDS, is_out_of_band
from glm4_deploy.validate.drift import BlockError, compare
from glm4_deploy.validate.taps import ATTENTION_TAP, HEAD_TAP, NORM_TAP, GraphTap
from glm4_exporters.config import Glm4Config
from glm4_exporters.pieces import Array, Values

Factor = npt.NDArray[np.float32]  # [channels]

# Keys: sub-blocks whose output channels an export may scale. Values: the reader, which undoes the factor.
READER = {
    "input_layernorm": "qk",
    "v": "o_proj",
    "post_attention_layernorm": "gate_up",
    "gate_up": "down",
    NORM_TAP: HEAD_TAP,
}
WORTH = 0.25  # share of the band; a factor is tried only for larger errors
EXPLAINED = 0.7  # share of the error; a factor explains the error if less than this share remains
SHARED = 1.5  # a shared power of two is preferred up to this multiple of the per-channel error
MOST_BITS = 60  # largest exponent of a shared power of two, so that scaled values stay within float32
FAR = 2  # smallest exponent of a shared power of two that counts as scaling even if a large error remains


@dataclass(frozen=True)
class Block:
    """One sub-block of a graph, and the reference's output: per sequence, one array for each value of the tap."""

    layer: int | None
    tap: GraphTap
    arithmetic: str
    reference: Sequence[tuple[Array, ...]]


@dataclass
class Reading:
    """The reference's values in one scale, from the possibly scaled sub-block to its reader.

    Attributes:
        values: the values that differ between readings, by the graph's names, one dict per sequence.
        errors: errors of the sub-blocks under this reading.
        factor: factor of the scaled sub-block's output. None: unscaled.
    """

    values: list[Values]
    errors: list[BlockError] = field(default_factory=list)
    factor: Factor | None = None

    @property
    def size(self) -> float:
        """The last sub-block's own relative error. Infinite if the error is NaN or was not measured."""
        local = self.errors[-1].local
        return local.relative if local is not None and math.isfinite(local.relative) else math.inf


class Readings:
    """The one or two possible readings at the current sub-block of a graph.

    Attributes:
        known: the values that all readings share, by the graph's names, one dict per sequence.
        open: the possible readings. The next reader decides between two.
    """

    def __init__(self, config: Glm4Config, sequences: int) -> None:
        self._config = config
        self._reader: str | None = None
        self._errors: list[BlockError] = []
        self.known: list[Values] = [{} for _ in range(sequences)]
        self.open = [Reading([{} for _ in range(sequences)])]

    def inputs(self, reading: Reading) -> list[Values]:
        """All values of each sequence under one reading, by the graph's names."""
        return [{**known, **own} for known, own in zip(self.known, reading.values, strict=True)]

    def add(self, block: Block, own: Sequence[Values], found: Sequence[Sequence[Values]]) -> None:
        """Compare the output of a sub-block with the reference.

        Args:
            own: output in the whole bundle, from the bundle's own earlier values; one dict per sequence.
            found: output from the :meth:`inputs` of each open reading; per reading, one dict per sequence.
        """
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # values beyond float16's range become infinite, and so does the error
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
        """Choose a reading. Returns the reading and the readings that follow from it: unscaled, perhaps scaled too."""

        def fits(pair: tuple[Reading, list[Reading]]) -> Reading:
            return min(pair[1], key=lambda one: one.size)

        pairs = list(zip(self.open, branches, strict=True))
        best = min(pairs, key=lambda pair: fits(pair).size)
        if not is_out_of_band(fits(best).errors[-1]):
            return best
        return min(pairs, key=lambda pair: (sum(map(is_out_of_band, pair[0].errors)), fits(pair).size))

    def settle(self, reading: Reading) -> None:
        """Accept one reading as the right one: its values become known, its errors final."""
        self._errors += reading.errors
        for known, new in zip(self.known, reading.values, strict=True):
            known.update(new)
        self.open, self._reader = [Reading([{} for _ in self.known])], None

    def errors(self) -> list[BlockError]:
        """Return the final errors since the last call, and remove them."""
        found, self._errors = self._errors, []
        return found

    def forget(self, name: str) -> None:
        """Drop a value that no later sub-block needs."""
        for values in (self.known, *(reading.values for reading in self.open)):
            for one in values:
                one.pop(name, None)

    def _branch(
        self, block: Block, reading: Reading, own: Sequence[Values], found: Sequence[Values]
    ) -> list[Reading]:
        """The readings of a sub-block that follow from ``reading``: unscaled and, if a factor explains the error,
        scaled."""
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
    """Estimate the factors from the reference's values [..., channels] to the found values of the same shape.

    Returns:
        The least-squares factor of each channel, and the power of two nearest to the channels' median ratio of norms;
        both float32 [channels].
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
    middle = 1.0 if math.isnan(middle) else middle  # NaN outputs have no scale
    middle = min(max(middle, 2.0**-MOST_BITS), 2.0**MOST_BITS)
    shared = 2.0 ** round(math.log2(middle))
    return each, np.full_like(each, shared)


def passed_on(factor: Factor, config: Glm4Config) -> Factor:
    """Repeat a factor of the values [Hkv * D] over the query heads, to attention's output [H * D]."""
    group = config.num_attention_heads // config.num_key_value_heads
    return np.repeat(factor.reshape(-1, config.head_dim), group, axis=0).reshape(-1)


def _measured(block: Block, factor: Factor | None, own: Sequence[Values], found: Sequence[Values]) -> Reading:
    wanted = [_in_graph(block.tap, one, factor, own[0]) for one in block.reference]
    drift, local = compare(wanted, own), compare(wanted, found)
    error = BlockError(block.layer, block.tap.tap, block.tap.covers, block.arithmetic, drift, local)
    return Reading(wanted, [error], factor)


def _in_graph(tap: GraphTap, arrays: Sequence[Array], factor: Factor | None, like: Values) -> Values:
    """The reference's values by the graph's names, in the graph's element types and scale."""
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
