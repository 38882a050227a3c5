"""The report's plots: scores with their intervals, and perplexity by position."""

from glm4_deploy.evaluate.run import Evaluation
from glm4_deploy.validate.plots import BLUE, GREEN, ORANGE, RED, SOFT, svg_figure

ENGINE_COLOURS = (SOFT, BLUE, ORANGE, GREEN, RED)
STEP = 0.16  # between the engines of one task, in rows
BESIDE = 0.03  # between the engines of one bucket, in buckets


def score_plot(found: Evaluation) -> str:
    """Scores in percent with 95 % intervals: one row per task, one colour per engine. Empty without scores."""
    tasks = [task for task in found.tasks if any(r.score for r in found.rows if r.task == task)]
    if not tasks:
        return ""
    labels = [each.label for each in found.engines]
    with svg_figure(9.6, 1.1 + len(tasks) * (0.3 + 0.17 * len(labels))) as (figure, axes, out):
        for number, label in enumerate(labels):
            colour = ENGINE_COLOURS[number % len(ENGINE_COLOURS)]
            for place, task in enumerate(tasks):
                estimate = found.row(task, label).score
                if estimate is None:
                    continue
                at = place + STEP * (number - (len(labels) - 1) / 2)
                axes.plot(
                    [100 * estimate.low, 100 * estimate.high], [at, at], color=colour, linewidth=4, alpha=0.35,
                    solid_capstyle="round",
                )  # fmt: skip
                axes.plot(
                    [100 * estimate.value], [at], "o", color=colour, markersize=6,
                    label=label if place == 0 else None,
                )  # fmt: skip
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_ylim(-0.6, len(tasks) - 0.4)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("score, % (bar: 95 % interval)")
        axes.legend(loc="lower center", ncols=5, bbox_to_anchor=(0.5, 1.0), fontsize=9.5)
        figure.tight_layout()
    return out.getvalue()


def position_plot(found: Evaluation) -> str:
    """Perplexity per bucket of positions, one line per engine. Empty without such a task."""
    if not found.buckets:
        return ""
    count = len(found.engines)
    with svg_figure(9.6, 3.4) as (figure, axes, out):
        for number, engine in enumerate(found.engines):
            aside = BESIDE * (number - (count - 1) / 2)  # equal engines would hide each other
            axes.plot(
                [place + aside for place in range(len(found.buckets))],
                [found.perplexity(bucket, engine.label) for bucket in found.buckets],
                "o-" if number < len(ENGINE_COLOURS) else "s--",
                color=ENGINE_COLOURS[number % len(ENGINE_COLOURS)],
                linewidth=1.4,
                markersize=5,
                label=engine.label,
            )
        axes.set_xticks(range(len(found.buckets)), [bucket.rpartition("_")[2] for bucket in found.buckets])
        axes.set_xlabel("position in the text, tokens")
        axes.set_ylabel("perplexity")
        axes.legend(loc="lower center", ncols=min(count, 8), bbox_to_anchor=(0.5, 1.0), fontsize=9.5)
        figure.tight_layout()
    return out.getvalue()
