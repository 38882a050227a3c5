"""Scores, differences between two engines on the same items, and what such a difference could show."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from glm4_deploy.metrics import Vector
from glm4_deploy.validate.statistics import CONFIDENCE, SEED

DRAWS = 10_000
POWER = 0.8  # chance to find the difference that `detectable` names
LEVEL = 0.05
# Log-probabilities that differ less are called equal: other batch sizes change them by about 1e-5 in fp32.
ROUNDING = 1e-3


@dataclass(frozen=True)
class MeanEstimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A second engine's mean less the first's, over the same items.

    Attributes:
        estimate: the difference with its 95 % interval.
        p: two-sided p-value of "there is no difference".
        test: name of the test that gave p.
    """

    estimate: MeanEstimate
    p: float
    test: str


def score(values: Sequence[float]) -> MeanEstimate:
    """Mean of the items' scores. Interval: Wilson's for right and wrong, else from resampling the items."""
    x = np.asarray(values, np.float64)
    if _is_binary(x):
        interval = stats.binomtest(int(x.sum()), len(x)).proportion_ci(CONFIDENCE, "wilson")
        return MeanEstimate(float(x.mean()), float(interval.low), float(interval.high))
    return _mean(x)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two engines on the same items.

    p is McNemar's exact test for right and wrong (McNemar, "Note on the sampling error of the difference between
    correlated proportions or percentages", 1947), and else a test that flips the signs of the paired differences.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if _is_binary(a) and _is_binary(b):
        return Difference(_mean(b - a), mcnemar_p(int((a > b).sum()), int((a < b).sum())), "McNemar")
    change = b - a
    change[np.abs(change) < ROUNDING] = 0
    return Difference(_mean(change), sign_flip_p(change), "sign flips")


def mcnemar_p(lost: int, won: int) -> float:
    """Two-sided p of "an item that differs is as likely lost as won"."""
    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def detectable(differing: float, items: int) -> float:
    """The smallest difference that right and wrong answers show at LEVEL with chance POWER, as a share of the items.

    Args:
        differing: share of the items that only one of the two engines answers right.

    Normal approximation of McNemar's test (Connor, "Sample size for testing differences in proportions for the
    paired-sample design", 1987). At least six items must differ, all in one direction, for p < 0.05.
    """
    z = stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)
    return max(float(z * math.sqrt(differing / items)), 6 / items)


def _mean(x: Vector) -> MeanEstimate:
    """The mean, with the percentiles of the means of resampled items (the paired bootstrap, for differences)."""
    if np.ptp(x) == 0:
        return MeanEstimate(float(x[0]), float(x[0]), float(x[0]))
    chance, tail = np.random.default_rng(SEED), (1 - CONFIDENCE) / 2
    means = _chunked(lambda count: x[chance.integers(0, len(x), (count, len(x)))].mean(-1), len(x))
    low, high = np.quantile(means, (tail, 1 - tail))
    return MeanEstimate(float(x.mean()), float(low), float(high))


def sign_flip_p(x: Vector) -> float:
    """Two-sided p of a mean of 0: the share of random sign patterns that give a mean as large (Fisher's randomization)."""
    if not x.any():
        return 1.0
    chance = np.random.default_rng(SEED)
    means = _chunked(lambda count: (chance.choice((-1.0, 1.0), (count, len(x))) * x).mean(-1), len(x))
    as_large = int((np.abs(means) >= abs(x.mean()) * (1 - 1e-12)).sum())
    return (as_large + 1) / (len(means) + 1)


def _chunked(draw: Callable[[int], Vector], items: int) -> Vector:
    """DRAWS numbers, drawn so many at a time that memory stays below about 100 MB."""
    at_once = max(1, min(DRAWS, 5_000_000 // items))
    left, parts = DRAWS, []
    while left > 0:
        parts.append(draw(min(at_once, left)))
        left -= at_once
    return np.concatenate(parts)


def _is_binary(x: Vector) -> bool:
    return bool(np.isin(x, (0.0, 1.0)).all())
