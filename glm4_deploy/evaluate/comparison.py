"""Two engines' answers to one task, item by item."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from glm4_deploy.evaluate.scored import ScoredItem
from glm4_deploy.evaluate.statistics import (
    ROUNDING,
    Difference,
    MeanEstimate,
    detectable,
    paired_difference,
    score,
)
from glm4_runtime.errors import Glm4Error

ALL = "all tasks"


@dataclass(frozen=True)
class Answers:
    """One engine's answers to one task.

    Attributes:
        metric: name of the task's metric; None if the task has only log-probabilities.
        tokens: mean tokens of a generated answer; None if the task generates none.
        cut: number of prompts that are longer than the engine has room for.
        rounding: items' log-probabilities that differ less are called equal.
    """

    items: tuple[ScoredItem, ...]
    metric: str | None
    tokens: float | None = None
    cut: int = 0
    rounding: float = ROUNDING

    @property
    def scores(self) -> list[float]:
        return [each.score for each in self.items if each.score is not None]

    @property
    def nats(self) -> list[float]:
        return [each.nats for each in self.items if each.nats is not None]


@dataclass(frozen=True)
class TaskRow:
    """One task and one engine, compared with the first engine.

    Attributes:
        score: mean score with its interval; None if the task has no score.
        nats: mean log-probability of the right answer.
        score_change, nats_change: second less first; None for the first engine.
        lost, won: indices of items whose score fell or rose.
        changed: number of items with another answer, right or wrong.
    """

    task: str
    engine: str
    items: int
    metric: str | None
    score: MeanEstimate | None
    nats: float | None
    tokens: float | None
    score_change: Difference | None = None
    nats_change: Difference | None = None
    lost: tuple[int, ...] = field(default=())
    won: tuple[int, ...] = field(default=())
    changed: int = 0

    @property
    def detectable(self) -> float | None:
        """The smallest change of the score that these items could show, given how many differed."""
        if self.score_change is None:
            return None
        return detectable(max((len(self.lost) + len(self.won)) / self.items, 1 / self.items), self.items)


def compare_answers(task: str, engine: str, first: Answers, answers: Answers, is_first: bool) -> TaskRow:
    """Make the row of one task and one engine.

    Raises:
        Glm4Error: the two were asked different items.
    """
    if [each.item for each in first.items] != [each.item for each in answers.items]:
        raise Glm4Error(
            f"{engine} was asked other items of {task} than the first engine; remove the kept answers"
        )
    pairs = list(enumerate(zip(first.items, answers.items, strict=True)))
    scored = len(first.scores) == len(answers.scores) == len(pairs)
    measured = [(a.nats, b.nats) for _, (a, b) in pairs if a.nats is not None and b.nats is not None]
    return TaskRow(
        task=task,
        engine=engine,
        items=len(pairs),
        metric=answers.metric,
        score=score(answers.scores) if scored else None,
        nats=fmean(answers.nats) if answers.nats else None,
        tokens=answers.tokens,
        score_change=None if is_first or not scored else paired_difference(first.scores, answers.scores),
        nats_change=None
        if is_first or not measured
        else paired_difference([a for a, _ in measured], [b for _, b in measured], answers.rounding),
        lost=tuple(place for place, (a, b) in pairs if _below(b.score, a.score)),
        won=tuple(place for place, (a, b) in pairs if _below(a.score, b.score)),
        changed=sum(a.answer != b.answer for _, (a, b) in pairs),
    )


def _below(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one < other


def pooled(answers: Sequence[Answers]) -> Answers:
    """All tasks' answers as those of one task."""
    metrics = {each.metric for each in answers}
    return Answers(
        tuple(item for each in answers for item in each.items),
        metrics.pop() if len(metrics) == 1 else "score",
        rounding=min(each.rounding for each in answers),
    )
