"""The dashboard's queries, and a drawing of what Prometheus answers to them."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "deploy/grafana/dashboards/glm4.json"
# What Grafana puts in place of its variables.
VARIABLES = {"$__rate_interval": "10s", "$job": ".+"}
_SUFFIX = re.compile(r"_(bucket|sum|count)$")


def panels():
    return json.loads(FILE.read_text())["panels"]


def queries():
    """Panel's title, query and legend of its series, with values for Grafana's variables."""
    found = []
    for panel in panels():
        for target in panel["targets"]:
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            found.append((panel["title"], text, target["legendFormat"]))
    return found


def metrics_of(query):
    """The names of the metrics in a query, as they are in /metrics."""
    return {_SUFFIX.sub("", name) for name in re.findall(r"\bglm4_\w+", query)}


def named(legend, labels):
    """The name of a series, as Grafana makes it."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels[found[1]], legend)


def draw(answers, path):
    """Draw each panel from the series that Prometheus gave: title -> list of (name, times, values)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 12), layout="constrained")
    for place, (title, series) in zip(figure.subplots(4, 3).flat, answers.items(), strict=False):
        place.set_title(title, fontsize=10)
        for label, times, values in series:
            place.plot([time - times[0] for time in times], values, label=label)
        place.set_ylim(bottom=0)
        place.legend(fontsize=7)
    figure.savefig(path, dpi=70)
