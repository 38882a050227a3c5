"""Perplexity, with intervals from resampling blocks of tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from glm4_deploy.metrics import Vector

BLOCK = 32  # consecutive tokens that are resampled together, because their losses are correlated
RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 20250414


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; no interval if there are too few tokens."""

    value: float
    low: float | None
    high: float | None


def perplexity(log_likelihoods: Sequence[Vector]) -> Estimate:
    """exp of the mean loss. Input: the tokens' log-likelihoods, one array per sequence."""
    return _exp_of_mean([-values for values in log_likelihoods])


def perplexity_ratio(expected: Sequence[Vector], actual: Sequence[Vector]) -> Estimate:
    """Perplexity of ``actual`` over that of ``expected``, from the same tokens' log-likelihoods.

    Paired: the differences are resampled, so that the difficulty of the text cancels (Koehn,
    "Statistical Significance Tests for Machine Translation Evaluation", 2004), in blocks, since the losses of
    neighbouring tokens depend on each other (Künsch, "The Jackknife and the Bootstrap for General Stationary
    Observations", 1989).
    """
    return _exp_of_mean([e - a for e, a in zip(expected, actual, strict=True)])


def _exp_of_mean(values: Sequence[Vector]) -> Estimate:
    blocks = [one[at : at + BLOCK] for one in values for at in range(0, len(one), BLOCK)]
    sums, counts = np.array([block.sum() for block in blocks]), np.array([len(block) for block in blocks])
    value = _exp(sums.sum() / counts.sum())
    if len(blocks) < 4:
        return Estimate(value, None, None)
    drawn = np.random.default_rng(SEED).integers(0, len(blocks), (RESAMPLES, len(blocks)))
    means = sums[drawn].sum(-1) / counts[drawn].sum(-1)
    tail = (1 - CONFIDENCE) / 2
    low, high = (_exp(float(x)) for x in np.quantile(means, (tail, 1 - tail)))
    return Estimate(value, low, high)


def _exp(x: float) -> float:
    """exp; infinite instead of an error if a float cannot hold the result."""
    return math.exp(x) if x < 700 else math.inf


_Statistic = Callable[[Vector], float]
SUMMARIES: dict[str, _Statistic] = {
    "kl_mean": lambda kl: float(kl.mean()),
    "kl_p99": lambda kl: float(np.quantile(kl, 0.99)),
    "kl_max": lambda kl: float(kl.max()),
}
