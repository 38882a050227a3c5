"""Differences between two models' outputs, for parity and validate."""

import numpy as np
import numpy.typing as npt

from glm4_runtime.arrays import Logits as Logits

Vector = npt.NDArray[np.float64]

STEPS = {
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}  # relative distance between neighbouring numbers
POSITIONS_AT_ONCE = 32  # positions in float64 at a time; one takes 1.2 MB


def log_softmax(x: Vector) -> Vector:
    x = x - x.max(-1, keepdims=True)
    result: Vector = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result


def kl_divergence(expected: Logits, actual: Logits) -> Vector:
    """KL(expected || actual) per position, in nats and float64."""
    parts = [np.empty(0)]
    for at in range(0, len(expected), POSITIONS_AT_ONCE):
        log_p, log_q = (
            log_softmax(x[at : at + POSITIONS_AT_ONCE].astype(np.float64)) for x in (expected, actual)
        )
        parts.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
    return np.concatenate(parts)


def near_ties(expected: Logits, actual: Logits, activations: str) -> npt.NDArray[np.bool_]:
    """Positions where ``actual`` prefers another token, whose logit is within two steps of its type from the best.

    A graph's logits are rounded to the activations' type. Each of two logits may be one step off (2^-10 of their size
    in float16), so two logits within two steps can change places.
    """
    rows = np.arange(len(expected))
    best, chosen = expected.max(-1), expected[rows, actual.argmax(-1)]
    steps = 2 * STEPS[activations] * np.abs(best)
    ties: npt.NDArray[np.bool_] = (expected.argmax(-1) != actual.argmax(-1)) & (best - chosen <= steps)
    return ties
