"""The result as one HTML page that includes styles and plots, so that it opens offline."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import fmean

import jinja2
from markupsafe import Markup

from glm4_deploy import __version__
from glm4_deploy.evaluate.comparison import TaskRow
from glm4_deploy.evaluate.plots import position_plot, score_plot
from glm4_deploy.evaluate.run import Evaluation
from glm4_deploy.evaluate.scored import ScoredItem
from glm4_deploy.evaluate.statistics import Difference
from glm4_deploy.evaluate.table import p_value, percent
from glm4_deploy.validate.html import PAGE_STYLE

REPORT_TEMPLATE = "report.html.jinja"
FLIPS_SHOWN = 12  # items per task and engine
DEPTHS = 5  # of a long text


@dataclass(frozen=True)
class EngineTile:
    """One engine at the top of the page. ``state`` is a class of the style: passed, failed or not-gated."""

    label: str
    state: str
    word: str
    value: str
    detail: str


@dataclass(frozen=True)
class Depth:
    """A task's scores by where the answer stands in the text. ``scores``: per engine, one mean per part of the text."""

    task: str
    parts: list[str]
    scores: dict[str, list[float | None]]


@dataclass(frozen=True)
class Flip:
    """One item that the first engine answered right and another wrong, or the other way round."""

    task: str
    engine: str
    lost: bool
    first: ScoredItem
    other: ScoredItem


def eval_page(found: Evaluation) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "p": p_value}
    template = environment.from_string(files(__package__).joinpath(REPORT_TEMPLATE).read_text("utf-8"))
    return template.render(
        found=found,
        version=__version__,
        style=Markup(PAGE_STYLE),
        tiles=[_tile(found, engine.label) for engine in found.engines],
        plot=Markup(score_plot(found)),
        by_position=Markup(position_plot(found)),
        flips=_flips(found),
        depths=_depths(found),
    )


def _tile(found: Evaluation, label: str) -> EngineTile:
    row = found.row(found.rows[-1].task, label)
    value = "" if row.score is None else f"{100 * row.score.value:.1f} %"
    if label == found.engines[0].label:
        return EngineTile(label, "not-gated", "compared with", value, f"{row.items} items")
    verdicts = [each for each in found.verdicts if each.row.engine == label]
    failed = any(each.failed for each in verdicts)
    state, word = (
        ("not-gated", "no gate") if not verdicts else ("failed", "failed") if failed else ("passed", "passed")
    )
    return EngineTile(label, state, word, value, _says(row))


def _says(row: TaskRow) -> str:
    parts = []
    if row.score_change is not None:
        parts.append(f"{100 * row.score_change.estimate.value:+.2f} points, {_p(row.score_change)}")
    if row.nats_change is not None:
        parts.append(f"{row.nats_change.estimate.value:+.4f} nats, {_p(row.nats_change)}")
    return "; ".join(parts)


def _p(change: Difference) -> str:
    return f"p {'' if change.p < 0.001 else '= '}{p_value(change.p)}"


def _flips(found: Evaluation) -> list[Flip]:
    first, flips = found.engines[0].label, []
    for row in found.rows:
        if row.task not in found.answers[first]:
            continue
        for lost, places in ((True, row.lost), (False, row.won)):
            flips += [
                Flip(
                    row.task,
                    row.engine,
                    lost,
                    found.answers[first][row.task].items[place],
                    found.answers[row.engine][row.task].items[place],
                )
                for place in places[:FLIPS_SHOWN]
            ]
    return flips


def _depths(found: Evaluation) -> list[Depth]:
    tables = []
    for task, answers in found.answers[found.engines[0].label].items():
        if not any(item.place for item in answers.items):
            continue
        scores = {label: _by_part(tasks[task].items) for label, tasks in found.answers.items()}
        parts = [f"{100 * part // DEPTHS} to {100 * (part + 1) // DEPTHS} %" for part in range(DEPTHS)]
        tables.append(Depth(task, parts, scores))
    return tables


def _by_part(items: Sequence[ScoredItem]) -> list[float | None]:
    parts: list[list[float]] = [[] for _ in range(DEPTHS)]
    for item in items:
        if item.place is not None and item.score is not None:
            parts[min(int(item.place * DEPTHS), DEPTHS - 1)].append(item.score)
    return [fmean(part) if part else None for part in parts]
