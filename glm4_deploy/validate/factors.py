"""Factors per channel: what a sub-block's output has, and what the next matrix undoes.

An export may multiply a sub-block's output by a factor per channel, and divide the columns of the next matrix (the
"reader") by the same factor. Two measurements show such a factor:

    found     least squares over positions: the sub-block's output is found * the reference's output
    undone    least squares over rows: the reader's column is scale * the checkpoint's column

An export is right if found * scale is 1 in every channel, up to the errors of both measurements. The error of a scale
follows from the rest of its fit. Let e be the norm of the rest over the norm of the fit, in one column of n rows:

    standard error    e / sqrt(n - 1): rows are rounded independently
    bias              the scale is too small by 0 to e^2, of its own column or of all columns, which share steps. The
                      true factor lies between the regression of the graph's column on the checkpoint's and the
                      reverse one (Frisch, "Statistical Confluence Analysis", 1934). Plain rounding has no bias, a
                      quantizer of least error the whole bias (Lloyd's centroid condition).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_exporters.config import Glm4Config

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]  # [channels]
Factor = npt.NDArray[np.float32]  # [channels]

MOST_BITS = 60  # largest exponent of a shared power of two, so that scaled values stay within float32
LEAST_ERROR = 1e-9  # of a scale; bounds the weight of a channel that is exact
SIGMAS = 6.0  # standard errors: exceeded by chance in 1 of 5e8 channels, more than a 32B model has


@dataclass(frozen=True)
class Undone:
    """What a matrix undoes, for each channel of its input; all float64 [channels].

    Attributes:
        scale: the graph's column over the checkpoint's column.
        error: relative standard error of the scale; infinite for an unknown scale, such as of a column of zeros.
        rest: e^2.
        limit: the largest relative error that a right matrix has.
    """

    scale: Vector
    error: Vector
    rest: Vector
    limit: float

    @property
    def bias(self) -> Vector:
        """The scale is relatively too small by 0 to this."""
        known = self.rest[np.isfinite(self.rest)]
        return np.maximum(self.rest, known.mean() if len(known) else 0)

    @property
    def fits(self) -> bool:
        """Whether the matrix is the checkpoint's, up to one factor per column. A wrong matrix shows no factor."""
        return bool(np.median(self.rest) <= self.limit**2)

    def grouped(self, config: Glm4Config) -> "Undone":
        """From attention's output [H * D] to the values [Hkv * D]: the mean over the query heads of a group."""
        group = config.num_attention_heads // config.num_key_value_heads
        scale, error, rest = (
            one.reshape(-1, group, config.head_dim) for one in (self.scale, self.error, self.rest)
        )
        spread = np.sqrt((error**2).sum(1)) / group
        return Undone(scale.mean(1).ravel(), spread.ravel(), rest.max(1).ravel(), self.limit)


def undone_columns(graph: Array, checkpoint: Array, limit: float) -> Undone:
    """Compare columns of a matrix, [columns, rows] each."""
    g, w = graph.astype(np.float64), checkpoint.astype(np.float64)
    with np.errstate(all="ignore"):
        square = (w * w).sum(1)
        scale = (g * w).sum(1) / square
        rest = ((g - scale[:, None] * w) ** 2).sum(1) / (scale**2 * square)
    known = np.isfinite(scale) & (rest < 1)  # a rest as large as the fit leaves no factor
    rest = np.where(known, rest, np.inf)
    return Undone(np.where(known, scale, 1.0), np.sqrt(rest / max(g.shape[1] - 1, 1)), rest, limit)


def joined(parts: Sequence[Undone]) -> Undone:
    """Channels of one matrix that were measured in parts."""
    scale, error, rest = (
        np.concatenate(one) for one in zip(*((p.scale, p.error, p.rest) for p in parts), strict=True)
    )
    return Undone(scale, error, rest, parts[0].limit)


def found_factors(reference: Sequence[Array], found: Sequence[Array]) -> tuple[Factor, Factor]:
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


def is_undone(found: Factor, reader: Undone, slack: float) -> bool:
    """Whether a matrix undoes the factors, up to the errors of both.

    Three tests: every channel alone, the mean over all channels, and the share of the factors that remains. The last two
    find small errors that all channels have.

    Args:
        slack: relative error that the found factors may have.
    """
    known = np.isfinite(reader.error)
    rest, error = found[known] * reader.scale[known] - 1, reader.error[known]
    if not len(rest):
        return True
    low, high = -reader.bias[known] - slack, np.full_like(rest, slack)
    if not ((low - SIGMAS * error <= rest) & (rest <= high + SIGMAS * error)).all():
        return False
    size = np.log(np.maximum(np.abs(found[known]), 2.0**-MOST_BITS))
    weight = 1 / np.maximum(error, LEAST_ERROR) ** 2
    return all(
        _is_allowed(rest, low, high, weight, along) for along in (np.ones_like(size), size - size.mean())
    )


def _is_allowed(rest: Vector, low: Vector, high: Vector, weight: Vector, along: Vector) -> bool:
    """Whether the share of ``along`` in ``rest`` may come from chance and a bias of ``low`` to ``high``.

    Weighted least squares with one unknown.
    """
    each, deviation = weight * along, math.sqrt(float((weight * along**2).sum()))
    share, ends = float(each @ rest), np.stack((each * low, each * high))
    low_end, high_end = float(ends.min(0).sum()), float(ends.max(0).sum())
    return low_end - SIGMAS * deviation <= share <= high_end + SIGMAS * deviation


def expected_factor(found: Factor, readers: Sequence[Undone], slack: float, whole_bits: bool) -> Factor:
    """The factor that a right sub-block has: ``found`` if a reader undoes it, or else what the first reader undoes.

    A reader that is wrong itself says nothing, so ``found`` stays. If one number k is missing in all channels, the
    sub-block or the reader is wrong by k. Exports centre their factors: the smallest is the inverse of the largest. So
    the more centred of ``found`` and ``found`` / k is right.

    Args:
        slack: relative error that the found factors may have.
        whole_bits: the factors may have a power of two besides.
    """
    fitting = [one for one in readers if one.fits]
    if not fitting or any(is_undone(found, reader, slack) for reader in fitting):
        return found
    reader = fitting[0]
    known = np.isfinite(reader.error) & (np.abs(reader.scale) > 2.0**-MOST_BITS)
    unscaled = np.abs(reader.scale - 1) <= SIGMAS * reader.error + reader.bias
    if not unscaled.all() and _is_reader_wrong(found, reader, slack, whole_bits):
        return found
    middle = np.where(known, reader.scale, 1) * (1 + np.where(known, reader.bias, 0) / 2)
    return np.select([~known, unscaled], [found, 1], 1 / middle).astype(np.float32)


def _is_reader_wrong(found: Factor, reader: Undone, slack: float, whole_bits: bool) -> bool:
    """Whether one number is missing in all channels, and the found factors are centred without it."""
    missing = float(np.median(found * reader.scale))
    if not math.isfinite(missing) or missing <= 0:
        return False
    without = (found / missing).astype(np.float32)
    error = math.log2(1 + float(np.median(SIGMAS * reader.error + reader.bias)))
    return is_undone(without, reader, slack) and (
        _off_centre(found, whole_bits) + error < _off_centre(without, whole_bits)
    )


def _off_centre(factor: Factor, whole_bits: bool) -> float:
    """Exponent of 2 by which the middle of the smallest and the largest factor is not 1 (or not a power of two)."""
    size = np.abs(factor[factor != 0]).astype(np.float64)
    middle = float(np.log2(size.min()) + np.log2(size.max())) / 2 if len(size) else 0.0
    return abs(middle - round(middle)) if whole_bits else abs(middle)


def passed_on(factor: Factor, config: Glm4Config) -> Factor:
    """Repeat a factor of the values [Hkv * D] over the query heads, to attention's output [H * D]."""
    group = config.num_attention_heads // config.num_key_value_heads
    return np.repeat(factor.reshape(-1, config.head_dim), group, axis=0).reshape(-1)
