"""The result as one table of text."""

from collections.abc import Sequence

from glm4_deploy.evaluate.comparison import TaskRow
from glm4_deploy.evaluate.run import Evaluation
from glm4_deploy.evaluate.statistics import Difference, MeanEstimate

HEADINGS = ("task", "engine", "score", "change", "p", "lost", "won", "log-prob.", "change", "p", "tokens")
LEFT = 2  # columns that are text


def table(found: Evaluation) -> str:
    """One line per task and engine."""
    return _aligned([HEADINGS, *(cells(row) for row in found.rows)], LEFT)


def positions_table(found: Evaluation) -> str:
    """Perplexity by position: one line per engine, with the change to the first in percent."""
    first = found.engines[0].label
    lines = [("perplexity by position", *(bucket.rpartition("_")[2] for bucket in found.buckets))]
    lines += [
        (engine.label, *(_perplexity(found, bucket, engine.label, first) for bucket in found.buckets))
        for engine in found.engines
    ]
    return _aligned(lines, left=1)


def _aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """Columns of one width; the first ``left`` are text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _perplexity(found: Evaluation, bucket: str, label: str, first: str) -> str:
    value, expected = found.perplexity(bucket, label), found.perplexity(bucket, first)
    return f"{value:.3f}" if label == first else f"{value:.3f} ({100 * (value / expected - 1):+.2f} %)"


def cells(row: TaskRow) -> tuple[str, ...]:
    """A row's values as text, in the order of HEADINGS; empty if not measured."""
    return (
        row.task,
        row.engine,
        "" if row.score is None else percent(row.score),
        *_change(row.score_change, 100, 1),
        "" if row.score_change is None else str(len(row.lost)),
        "" if row.score_change is None else str(len(row.won)),
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
