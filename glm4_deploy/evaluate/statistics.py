"""Scores, differences between two engines on the same items, and what such a difference could show."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from glm4_deploy.metrics import Vector
from glm4_deploy.validate.statistics import CONFIDENCE, SEED

DRAWS = 9_999
POWER = 0.8  # chance to find the difference that `detectable` names
LEVEL = 0.05
# Log-probabilities that differ less are called equal: rounding makes such differences (test_evaluate.py).
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


def paired_difference(
    first: Sequence[float], second: Sequence[float], rounding: float = ROUNDING
) -> Difference:
    """Compare two engines on the same items. Items that differ by less than ``rounding`` count as equal.

    p is McNemar's exact test for right and wrong (McNemar, "Note on the sampling error of the difference between
    correlated proportions or percentages", 1947), and else a test that flips the signs of the paired differences.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if _is_binary(a) and _is_binary(b):
        return Difference(_mean(b - a), mcnemar_p(int((a > b).sum()), int((a < b).sum())), "McNemar")
    change = b - a
    change[np.abs(change) < rounding] = 0
    return Difference(_mean(change), sign_flip_p(change), "sign flips")


def mcnemar_p(lost: int, won: int) -> float:
    """Two-sided p of "an item that differs is as likely lost as won"."""
    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def detectable(differing: float, items: int) -> float:
    """The smallest difference that right and wrong answers show at LEVEL with chance POWER, as a share of the items.

    Args:
        differing: share of the items that only one of the two engines answers right.

    Normal approximation of McNemar's test (Connor, "Sample size for testing differences in proportions for the
    paired-sample design", 1987). At least six items must differ, all in one direction, for p < 0.05. Above 1: no
    difference can be shown.
    """
    z = stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)
    return max(float(z * math.sqrt(differing / items)), 6 / items)


def _mean(x: Vector) -> MeanEstimate:
    """The mean, with the percentiles of the means of resampled items (the paired bootstrap, for differences)."""
    value = float(x.mean())
    if np.ptp(x) == 0:
        return MeanEstimate(value, value, value)
    found = stats.bootstrap(
        (x,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=SEED, **_drawn(x)
    ).confidence_interval
    return MeanEstimate(value, float(found.low), float(found.high))


def sign_flip_p(x: Vector) -> float:
    """Two-sided p of a mean of 0, from random signs of the differences (Fisher's randomization)."""
    return float(
        stats.permutation_test((x,), np.mean, permutation_type="samples", rng=SEED, **_drawn(x)).pvalue
    )


def _drawn(x: Vector) -> dict[str, int | bool]:
    """So many draws at a time that memory stays below about 100 MB."""
    return {"n_resamples": DRAWS, "batch": max(1, 5_000_000 // len(x)), "vectorized": True}


def _is_binary(x: Vector) -> bool:
    return bool(np.isin(x, (0.0, 1.0)).all())
