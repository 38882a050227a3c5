"""What one engine answered: a score, a log-probability and a text for each item of each task."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from glm4_runtime.errors import Glm4Error
from glm4_runtime.reasoning import begins_inside

LogLikelihoods = Callable[[Sequence[tuple[str, str]]], list[float]]


@dataclass(frozen=True)
class ScoredItem:
    """One item's answer.

    Attributes:
        item: SHA-256 of the item, equal for every engine.
        score: the task's metric, 1 is right; None for tasks that only measure log-probabilities.
        nats: log-probability of the right answer, in nats; None if the task has no single right answer.
        prompt, expected, answer: texts, to be shown.
        place: where in the prompt the answer stands, 0 (start) to 1 (end); None if the task does not say.
    """

    item: str
    score: float | None
    nats: float | None
    prompt: str
    expected: str
    answer: str
    place: float | None = None


def scored_items(
    samples: Sequence[dict[str, Any]], kind: str, log_likelihoods: LogLikelihoods
) -> list[ScoredItem]:
    """The answers to one task.

    Args:
        samples: the harness's log of the task. If the task has several filters, the first counts.
        kind: the task's ``output_type``.
        log_likelihoods: gives the log-probability of each continuation behind its context, in nats. For generated
            answers, the right answer's log-probability is measured by it.

    Raises:
        Glm4Error: a log-probability is not a number.
    """
    samples = [each for each in samples if each["filter"] == samples[0]["filter"]]
    nats = NATS[kind](samples, log_likelihoods)
    if any(each is not None and not math.isfinite(each) for each in nats):
        raise Glm4Error(
            "the engine gives log-probabilities that are no numbers; find the cause with validate --layers"
        )
    return [
        ScoredItem(
            item=each["doc_hash"],
            score=_score(each),
            nats=likelihood,
            prompt=str(each["arguments"][0][0]),
            expected=_expected(each, kind),
            answer=_answer(each, kind),
            place=each["doc"].get("place"),
        )
        for each, likelihood in zip(samples, nats, strict=True)
    ]


def metric_of(samples: Sequence[dict[str, Any]]) -> str | None:
    """The name of the metric that is the score: the first that is one number per item."""
    names = (name for name in samples[0]["metrics"] if isinstance(samples[0][name], int | float))
    return next(names, None)


def _score(sample: dict[str, Any]) -> float | None:
    name = metric_of([sample])
    return None if name is None else float(sample[name])


def _of_choices(samples: Sequence[dict[str, Any]], _: LogLikelihoods) -> list[float | None]:
    """The right choice's log-probability. A task may also score choices without their context; these come last."""
    return [
        float(each["resps"][each["target"]][0][0]) if isinstance(each["target"], int) else None
        for each in samples
    ]


def _of_generated(samples: Sequence[dict[str, Any]], log_likelihoods: LogLikelihoods) -> list[float | None]:
    """Log-probability of the target. A prompt that begins a thought has none: the answer would come after it."""
    texts = [
        each["target"]
        if isinstance(each["target"], str) and not begins_inside(each["arguments"][0][0])
        else None
        for each in samples
    ]
    pairs = [
        (each["arguments"][0][0], text if text[:1].isspace() else f" {text}")
        for each, text in zip(samples, texts, strict=True)
        if text
    ]
    found = iter(log_likelihoods(pairs))
    return [next(found) if text else None for text in texts]


def _of_continuation(samples: Sequence[dict[str, Any]], _: LogLikelihoods) -> list[float | None]:
    return [float(each["resps"][0][0][0]) for each in samples]


def _of_text(samples: Sequence[dict[str, Any]], _: LogLikelihoods) -> list[float | None]:
    return [float(each["resps"][0][0]) for each in samples]


# The harness's kinds of task (output_type), and how to find the right answer's log-probability.
NATS: dict[str, Callable[[Sequence[dict[str, Any]], LogLikelihoods], list[float | None]]] = {
    "multiple_choice": _of_choices,
    "generate_until": _of_generated,
    "loglikelihood": _of_continuation,
    "loglikelihood_rolling": _of_text,
}


def _expected(sample: dict[str, Any], kind: str) -> str:
    if kind == "multiple_choice" and isinstance(sample["target"], int):
        return str(sample["arguments"][sample["target"]][1]).strip()
    return str(sample["target"])


def _answer(sample: dict[str, Any], kind: str) -> str:
    if kind == "multiple_choice":
        best = max(range(len(sample["resps"])), key=lambda place: sample["resps"][place][0][0])
        return str(sample["arguments"][best][1]).strip()
    if kind == "generate_until":
        return str(sample["resps"][0][0])
    return ""
