"""Compares two models' outputs position by position, and summarizes at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_deploy.metrics import POSITIONS_AT_ONCE, Logits, Vector, kl_divergence, log_softmax, near_ties
from glm4_deploy.validate.drift import ErrorSum
from glm4_deploy.validate.statistics import SUMMARIES, Estimate, perplexity, perplexity_ratio

TOP = 5
NO_TARGET = -1

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Positions:
    """Measurements at positions of one sequence; ``target`` is the next token, -1 at the end."""

    sequence: int
    index: Indices
    target: Indices
    expected_log: Vector  # of the target
    actual_log: Vector
    kl: Vector
    expected_best: Indices
    actual_best: Indices
    expected_probability: Vector  # probability that each model gives to its own best token
    actual_probability: Vector
    top5: Vector  # share of common tokens among each model's five best
    tie: npt.NDArray[np.bool_]


def compare_positions(
    sequence: int, index: Indices, target: Indices, expected: Logits, actual: Logits, activations: str
) -> Positions:
    """Two models' logits [positions, vocabulary] at the same positions."""
    rows = np.arange(len(index))
    best = expected.argmax(-1), actual.argmax(-1)
    logs = np.empty((2, len(index))), np.empty((2, len(index)))  # of the target and of the best token
    for at in range(0, len(index), POSITIONS_AT_ONCE):
        block = slice(at, at + POSITIONS_AT_ONCE)
        for side, logits in enumerate((expected, actual)):
            log = log_softmax(logits[block].astype(np.float64))
            here = np.arange(len(log))
            logs[0][side, block] = log[here, target[block]]
            logs[1][side, block] = log[here, best[side][block]]
    logs[0][:, target == NO_TARGET] = np.nan
    tops = [np.argpartition(x, -min(TOP, x.shape[-1]), axis=-1)[:, -TOP:] for x in (expected, actual)]
    shared = [len(np.intersect1d(tops[0][row], tops[1][row])) / tops[0].shape[-1] for row in rows]
    return Positions(
        sequence=sequence,
        index=index,
        target=target,
        expected_log=logs[0][0],
        actual_log=logs[0][1],
        kl=kl_divergence(expected, actual),
        expected_best=best[0].astype(np.int64),
        actual_best=best[1].astype(np.int64),
        expected_probability=np.exp(logs[1][0]),
        actual_probability=np.exp(logs[1][1]),
        top5=np.array(shared),
        tie=near_ties(expected, actual, activations),
    )


@dataclass(frozen=True)
class Greedy:
    """Number of equal tokens at the beginning of two models' greedy texts, from the same prompts."""

    tokens: int
    common: tuple[int, ...]  # per prompt

    @property
    def median(self) -> float:
        return float(np.median(self.common))


@dataclass
class Comparison:
    """The comparison of ``actual`` with ``expected``, both by name; filled part by part.

    Attributes:
        precision: the row of the gate that applies to ``actual``.
        metrics: by the gates' names of metrics; filled by :meth:`summarize`.
    """

    expected: str
    actual: str
    precision: str
    task: str
    activations: str
    positions: list[Positions] = field(default_factory=list)
    greedy: Greedy | None = None
    perplexities: tuple[Estimate, Estimate] | None = None
    ratio: Estimate | None = None
    near_ties: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    _error: ErrorSum = field(default_factory=ErrorSum)
    _agree: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def add(self, sequence: int, index: Indices, target: Indices, expected: Logits, actual: Logits) -> None:
        """Outputs [positions, outputs] at some positions of a sequence."""
        self._error.add(expected, actual)
        if self.task == "causal-lm":
            self.positions.append(
                compare_positions(sequence, index, target, expected, actual, self.activations)
            )
        elif self.task != "encoder":
            self._agree.append(expected.argmax(-1) == actual.argmax(-1))

    def summarize(self) -> None:
        error = self._error.error()
        self.metrics = {"relative_error": error.relative}
        if self.task == "encoder":
            self.metrics["cosine"] = error.cosine
        elif self.task != "causal-lm":
            self.metrics["label_agreement"] = float(np.concatenate(self._agree).mean())
        else:
            self._summarize_text()

    def _summarize_text(self) -> None:
        logs = [
            (one.expected_log[known], one.actual_log[known])
            for one in self.positions
            if (known := one.target != NO_TARGET).any()
        ]
        expected, actual = [one for one, _ in logs], [one for _, one in logs]
        if logs:
            self.perplexities = perplexity(expected), perplexity(actual)
            self.ratio = perplexity_ratio(expected, actual)
            self.metrics["perplexity_ratio"] = self.ratio.value
        kl = self.all_kl
        self.metrics |= {name: summary(kl) for name, summary in SUMMARIES.items()}
        same = np.concatenate([one.expected_best == one.actual_best for one in self.positions])
        ties = np.concatenate([one.tie for one in self.positions])
        self.near_ties = int(ties.sum())
        self.metrics["top1_agreement"] = float((same | ties).mean())
        self.metrics["top5_agreement"] = float(np.concatenate([one.top5 for one in self.positions]).mean())
        if self.greedy is not None:
            self.metrics["greedy_prefix"] = self.greedy.median / self.greedy.tokens

    @property
    def compared(self) -> int:
        """Number of positions in the shares of agreement; for sequence classification, of sequences."""
        return sum(len(one.index) for one in self.positions) + sum(one.size for one in self._agree)

    @property
    def all_kl(self) -> Vector:
        return np.concatenate([one.kl for one in self.positions])

    @property
    def predicted_tokens(self) -> int:
        return sum(int((one.target != NO_TARGET).sum()) for one in self.positions)

    def as_dict(self) -> dict[str, Any]:
        return {
            "expected": self.expected,
            "actual": self.actual,
            "precision": self.precision,
            "positions": self.compared or None,
            "predicted_tokens": self.predicted_tokens or None,
            "perplexity": self.perplexities
            and dict(zip(("expected", "actual"), map(_estimate, self.perplexities), strict=True)),
            "perplexity_ratio": self.ratio and _estimate(self.ratio),
            "near_ties": self.near_ties,
            "greedy": self.greedy and {"tokens": self.greedy.tokens, "common_prefix": self.greedy.common},
            "metrics": self.metrics,
        }


def _estimate(estimate: Estimate) -> Mapping[str, float | None]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def worst_positions(comparison: Comparison, count: int) -> list[tuple[Positions, int]]:
    """The positions with the largest KL divergence, as part and row."""
    rows = [
        (float(np.nan_to_num(one.kl[row], nan=np.inf)), one, row)
        for one in comparison.positions
        for row in range(len(one.kl))
    ]
    rows.sort(key=lambda row: -row[0])
    return [(one, row) for _, one, row in rows[:count]]
