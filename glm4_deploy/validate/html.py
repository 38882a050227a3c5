"""The report as one HTML page that includes styles and plots, so that it opens offline."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from glm4_deploy import __version__, show
from glm4_deploy.validate import plots
from glm4_deploy.validate.gates import METRICS, Check
from glm4_deploy.validate.report import Report
from glm4_deploy.validate.statistics import Estimate

TEMPLATE = "report.html.jinja"
PAGE_STYLE = files(__package__).joinpath("style.css").read_text("utf-8")  # of all reports
PLOTS = ("perplexity", "kl", "drift", "heat")  # headings in the template; a report may lack some


@dataclass(frozen=True)
class Tile:
    """A main figure at the top of the page."""

    name: str
    value: str
    detail: str


def html_page(report: Report) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "size": show.readable_size,
        "percent": lambda x: f"{100 * x:.1f} %",
        "token": _token,
    }
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text("utf-8"))
    return template.render(
        report=report,
        style=Markup(PAGE_STYLE),
        version=__version__,
        tiles=_tiles(report),
        checks=[_check_row(check) for check in report.checks],
        plots=dict.fromkeys(PLOTS) | {name: Markup(svg) for name, svg in _plots(report).items()},
        blocks=report.out_of_band,
    )


def _plots(report: Report) -> dict[str, str]:
    found = {}
    with_reference = [one for one in report.comparisons if one.expected == "reference"]
    if any(one.ratio is not None for one in with_reference):
        found["perplexity"] = plots.perplexity_plot(report)
    if report.task == "causal-lm":
        found["kl"] = plots.kl_plot(with_reference)
    if report.blocks:
        found["drift"] = plots.drift_plot(report)
        found["heat"] = plots.heat_plot(report)
    return found


def _tiles(report: Report) -> list[Tile]:
    comparison = report.comparisons[0]
    metrics, tiles = comparison.metrics, []
    if comparison.perplexities is not None and comparison.ratio is not None:
        change = 100 * (comparison.ratio.value - 1)
        lower = "; lower is chance and no gain" if change < 0 else ""
        tiles.append(Tile("Perplexity", f"{change:+.3f} %", _interval(comparison.ratio) + lower))
    if "kl_mean" in metrics:
        tiles.append(
            Tile(
                "Mean KL",
                f"{metrics['kl_mean']:.2e}",
                f"p99 {metrics['kl_p99']:.1e}, max {metrics['kl_max']:.1e} nats",
            )
        )
        tiles.append(
            Tile(
                "Best token",
                f"{100 * metrics['top1_agreement']:.2f} %",
                f"the same; best five {100 * metrics['top5_agreement']:.2f} %",
            )
        )
    if comparison.greedy is not None:
        greedy = comparison.greedy
        tiles.append(
            Tile(
                "Greedy text",
                f"{greedy.median:g} / {greedy.tokens}",
                f"tokens the same, median of {len(greedy.common)}",
            )
        )
    if "label_agreement" in metrics:
        tiles.append(Tile("Labels", f"{100 * metrics['label_agreement']:.2f} %", "the same"))
    if "cosine" in metrics:
        tiles.append(Tile("Cosine", f"{metrics['cosine']:.6f}", "of the hidden states"))
    if len(tiles) < 4:
        tiles.append(Tile("Outputs", f"{metrics['relative_error']:.2e}", "relative error"))
    return tiles


def _check_row(check: Check) -> dict[str, Any]:
    open_ = not check.measured or not check.judged
    state = "open" if open_ else "passed" if check.passed else "failed"
    return {
        "metric": check.metric,
        "says": METRICS[check.metric].says,
        "value": "not measured" if check.value is None else f"{check.value:.6g}",
        "limit": f"{'≥' if METRICS[check.metric].at_least else '≤'} {check.limit:g}",
        "state": state,
    }


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "too few tokens for an interval"
    return f"95 %: {100 * (estimate.low - 1):+.3f} … {100 * (estimate.high - 1):+.3f} %"


def _token(text: str | None) -> str:
    """A token's text with visible white space and control characters."""
    if text is None:
        return "end of the text"
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"
