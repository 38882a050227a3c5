"""The result as one table of text."""

from glm4_deploy.evaluate.comparison import TaskRow
from glm4_deploy.evaluate.run import Evaluation
from glm4_deploy.evaluate.statistics import Difference, MeanEstimate

HEADINGS = ("task", "engine", "score", "change", "p", "lost", "won", "log-prob.", "change", "p", "tokens")
LEFT = 2  # columns that are text


def table(found: Evaluation) -> str:
    """One line per task and engine, aligned."""
    lines = [HEADINGS, *(cells(row) for row in found.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def cells(row: TaskRow) -> tuple[str, ...]:
    """A row's values as text, in the order of HEADINGS; empty if not measured."""
    first = row.score_change is None and row.nats_change is None
    return (
        row.task,
        row.engine,
        "" if row.score is None else percent(row.score),
        *_change(row.score_change, 100, 1),
        "" if first else str(len(row.lost)),
        "" if first else str(len(row.won)),
        "" if row.nats is None else f"{row.nats:.3f}",
        *_change(row.nats_change, 1, 4),
        "" if row.tokens is None else f"{row.tokens:.1f}",
    )


def percent(score: MeanEstimate) -> str:
    return f"{100 * score.value:.1f} % ({100 * score.low:.1f} to {100 * score.high:.1f})"


def _change(change: Difference | None, unit: float, digits: int) -> tuple[str, str]:
    if change is None:
        return "", ""
    return f"{unit * change.estimate.value:+.{digits}f}", p_value(change.p)


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
