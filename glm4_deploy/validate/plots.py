"""The report's plots as SVG inside the page, without scripts or fonts."""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from glm4_deploy.validate.bands import BANDS
from glm4_deploy.validate.comparison import Comparison
from glm4_deploy.validate.drift import BlockError
from glm4_deploy.validate.report import Report
from glm4_deploy.validate.taps import TAPS

INK, SOFT, GRID = "#1f2933", "#6b7785", "#e4e8ee"
BLUE, ORANGE, RED, GREEN = "#2f6fde", "#d97706", "#c81e3a", "#1a8a5a"
COLOURS = (BLUE, ORANGE, GREEN)
CARD = "#fefefe"
# The page's CSS variables for these colours, which differ in dark mode.
PAGE_COLOURS = {
    INK: "ink",
    SOFT: "soft",
    GRID: "line",
    BLUE: "blue",
    ORANGE: "orange",
    RED: "red",
    GREEN: "green",
    CARD: "card",
}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
}
EXACT = 1e-8  # position of an error of 0 on a logarithmic axis
# Colours: a quarter of the band is quiet, the band's edge amber, ten times the band red.
HEAT = LinearSegmentedColormap.from_list("band", ["#eef5f1", "#cfe6da", "#f4d58a", "#e2894c", RED])


def perplexity_plot(report: Report) -> str:
    """Change of perplexity against the reference in percent, with its interval and the gate's limit."""
    shown = [one for one in report.comparisons if one.expected == "reference" and one.ratio is not None]
    with svg_figure(4.9, 1.2 + 0.6 * len(shown)) as (figure, axes, out):
        for row, comparison in enumerate(shown):
            ratio = comparison.ratio
            assert ratio is not None
            value, colour = 100 * (ratio.value - 1), COLOURS[row]
            low, high = (value if x is None else 100 * (x - 1) for x in (ratio.low, ratio.high))
            axes.plot([low, high], [row, row], color=colour, linewidth=5, alpha=0.35, solid_capstyle="round")
            axes.plot([value], [row], "o", color=colour, markersize=8)
            axes.annotate(
                f"{value:+.3f} %",
                (value, row),
                (0, 10),
                textcoords="offset points",
                ha="center",
                color=colour,
            )
        limit = next((c.limit for c in report.checks if c.metric == "perplexity_ratio"), None)
        axes.axvline(0, color=SOFT, linewidth=1)
        if limit is not None:
            axes.axvline(100 * (limit - 1), color=RED, linewidth=1.4, linestyle=(0, (4, 3)))
            axes.annotate(
                "limit", (100 * (limit - 1), 0), (4, 5), xycoords=("data", "axes fraction"),
                textcoords="offset points", color=RED, fontsize=9.5,
            )  # fmt: skip
        axes.set_yticks(range(len(shown)), [f"{one.actual} ({one.precision})" for one in shown])
        axes.set_ylim(-0.6, len(shown) - 0.25)
        axes.invert_yaxis() if len(shown) > 1 else None
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)  # labels side by side, not on each other
        axes.set_xlabel("change against the reference, % (bar: 95 % interval)")
        figure.tight_layout()
    return out.getvalue()


def kl_plot(comparisons: Sequence[Comparison]) -> str:
    """Histogram of the KL divergence over the positions."""
    with svg_figure(4.9, 2.7) as (figure, axes, out):
        series = [np.maximum(np.nan_to_num(one.all_kl, nan=1e3, posinf=1e3), 1e-12) for one in comparisons]
        low, high = (
            min(np.quantile(x, 0.002) for x in series),
            max(x.max() for x in series),
        )  # values near 0 are not visible
        edges = np.geomspace(low / 1.3, high * 1.3, 50).tolist()
        for comparison, values, colour in zip(comparisons, series, COLOURS, strict=False):
            label = f"{comparison.actual} ({comparison.precision})"
            axes.hist(values, edges, color=colour, alpha=0.75 if len(series) == 1 else 0.5, label=label)
            for name, metric in (("mean", "kl_mean"), ("p99", "kl_p99")):
                x = comparison.metrics[metric]
                if math.isfinite(x) and x > 0:
                    axes.axvline(x, color=colour, linewidth=1.3)
                    axes.annotate(
                        name, (x, 1), (3, -9), xycoords=("data", "axes fraction"),
                        textcoords="offset points", color=colour, fontsize=9.5,
                    )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("KL divergence from the reference, nats")
        axes.set_ylabel("positions")
        if len(series) > 1:
            axes.legend(loc="lower center", ncols=2, bbox_to_anchor=(0.5, 1.0), fontsize=9.5)
        figure.tight_layout()
    return out.getvalue()


def drift_plot(report: Report) -> str:
    """Drift through the model, and below it each sub-block's own error."""
    blocks = report.blocks or []
    with svg_figure(9.6, 3.6) as (figure, axes, out):
        places = np.arange(len(blocks))
        axes.plot(
            places,
            [_height(b.drift.relative) for b in blocks],
            color=BLUE,
            linewidth=1.8,
            label="drift: own input",
        )
        own = [(place, _height(b.local.relative)) for place, b in enumerate(blocks) if b.local is not None]
        axes.plot(
            *zip(*own, strict=True),
            "o",
            color=ORANGE,
            markersize=3.2,
            label="own error: the reference's input",
        )
        limits = [BANDS[b.arithmetic].local for b in blocks]
        axes.plot(places, limits, "_", color=SOFT, markersize=8, markeredgewidth=1.5, label="its band")
        _mark_culprit(axes, report)
        starts = [
            place
            for place, b in enumerate(blocks)
            if b.layer is not None and b.block == _first(blocks, b.layer)
        ]
        step = max(1, math.ceil(len(starts) / 24))
        axes.set_xticks(starts[::step], [str(blocks[place].layer) for place in starts[::step]])
        axes.set_yscale("log")
        axes.set_xlim(-1, len(blocks))
        axes.set_xlabel("layer (each mark is a sub-block)")
        axes.set_ylabel("relative error")
        axes.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.17), fontsize=9.5)
        figure.tight_layout()
    return out.getvalue()


def heat_plot(report: Report) -> str:
    """Heat map of every sub-block's own error as a share of its band; rows are sub-blocks, columns are layers."""
    blocks = [block for block in report.blocks or [] if block.local is not None and block.layer is not None]
    names = [tap.name for tap in TAPS if any(block.block == tap.name for block in blocks)]
    count = 1 + max(block.layer or 0 for block in blocks)
    share = np.full((len(names), count), np.nan)
    for block in blocks:
        assert block.local is not None
        assert block.layer is not None
        band = BANDS[block.arithmetic]
        worst = max(block.local.relative / band.local, block.local.worst / band.worst)
        share[names.index(block.block), block.layer] = min(worst, 1e6) if math.isfinite(worst) else 1e6
    with svg_figure(9.6, 0.9 + 0.27 * len(names)) as (figure, axes, out):
        image = axes.pcolormesh(
            np.log10(np.maximum(share, 1e-4)),
            cmap=HEAT,
            vmin=-1.2,
            vmax=1.0,
            edgecolors=CARD,
            linewidth=1.2,
        )
        for row, column in np.argwhere(share > 1):
            axes.annotate(
                f"{share[row, column]:.0f}×" if share[row, column] < 1000 else "!", (column + 0.5, row + 0.5),
                ha="center", va="center", color="white", fontsize=8.5, fontweight="bold",
            )  # fmt: skip
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        step = max(1, math.ceil(count / 24))
        axes.set_xticks(np.arange(0, count, step) + 0.5, [str(i) for i in range(0, count, step)])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("layer")
        bar = figure.colorbar(image, ax=axes, pad=0.015, ticks=[-1, 0, 1])
        bar.ax.set_yticklabels(["a tenth of its band", "its band", "ten times"])
        bar.outline.set_visible(False)
        figure.tight_layout()
    return out.getvalue()


def _mark_culprit(axes: Axes, report: Report) -> None:
    blocks, culprit = report.blocks or [], report.culprit
    if culprit is None:
        return
    place = blocks.index(culprit.error)
    error = culprit.error.local or culprit.error.drift
    height = _height(max(error.relative, culprit.error.drift.relative))
    left = place > 0.6 * len(blocks)
    axes.axvline(place, color=RED, linewidth=1, alpha=0.6)
    axes.annotate(
        culprit.error.name, (place, height), (-8 if left else 8, 4), textcoords="offset points",
        ha="right" if left else "left", color=RED, fontweight="bold",
    )  # fmt: skip


def _first(blocks: Sequence[BlockError], layer: int) -> str:
    return next(block.block for block in blocks if block.layer == layer)


def _height(error: float) -> float:
    """Position of an error on a logarithmic axis."""
    return max(error, EXACT) if math.isfinite(error) else 1e2


@contextmanager
def svg_figure(width: float, height: float) -> Iterator[tuple[Figure, Axes, io.StringIO]]:
    out = io.StringIO()
    style: Any = STYLE | {"svg.hashsalt": f"{width} {height}"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        yield figure, figure.subplots(), out
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]  # without the XML prologue, which is for separate files
        for colour, name in PAGE_COLOURS.items():
            svg = svg.replace(colour, f"var(--{name})")
        out.write(re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL))
