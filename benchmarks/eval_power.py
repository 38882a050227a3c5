"""What ``eval`` finds: faults of a known size on demo/glm4-tasks, and how often chance alone is called a difference.

    python -m benchmarks.eval_power --items 80 --out benchmarks/results/eval-power.json

Engines: the checkpoint exported in float32; precisions; three faults, by their mean KL divergence on the tasks' own
texts; and two engines that differ in bits and not in quality ("native", and "batch-1" with one slot).
"""

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.noise import LAYER, noise_sizes, noisy_copy
from glm4_deploy.cli import cli
from glm4_deploy.evaluate.items import ITEM_KINDS, items
from glm4_deploy.evaluate.statistics import paired_difference
from glm4_deploy.pipeline import ExportOptions, export
from glm4_runtime.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parents[1] / "demo" / "glm4-tasks"
FIRST = "fp32"
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
}
EQUALS: dict[str, dict[str, Any]] = {  # in quality
    "native": {"precision": "fp32", "target": "native"},
    "batch-1": {"precision": "fp32", "max_batch_size": 1},
}
DIVERGENCES = (0.02, 0.05, 0.1)
PEOPLE = 2  # in a text of glm4_records
TEXTS = 12  # of each kind of items, for the mean KL divergence
RESAMPLINGS = 200
KEPT = ("selection", "rows", "warnings", "tools")  # of results.json


def measured(folder: Path, count: int = 200) -> dict[str, Any]:
    """Export all engines into ``folder``, and return what ``eval`` writes to results.json."""
    bundles = {name: (CHECKPOINT, options) for name, options in (PRECISIONS | EQUALS).items()}
    for kl, size in noise_sizes(CHECKPOINT, texts(), DIVERGENCES).items():
        noisy = noisy_copy(CHECKPOINT, folder / f"checkpoint-{kl}", LAYER, size)
        bundles[f"kl-{kl}"] = (noisy, PRECISIONS[FIRST])
    for name, (checkpoint, options) in bundles.items():
        export(checkpoint, folder / name, ExportOptions(**options, parity=False))
    named = [f"{name}={folder / name}" for name in bundles]
    cli.main(
        ["eval", *named, "--people", str(PEOPLE), "--items", str(count), "--output", str(folder / "out")],
        standalone_mode=False,
    )
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text("utf-8"))
    return found


def texts() -> list[list[int]]:
    """Items with their answers, as token ids."""
    tokenizer = Tokenizer.from_folder(CHECKPOINT)
    asked = [
        item
        for kind in ITEM_KINDS
        for item in islice(items(kind, 1, PEOPLE if kind == "records" else None), TEXTS)
    ]
    return [tokenizer.encode(f"{item.prompt}\nAnswer: {item.answer}") for item in asked]


def false_alarms(found: dict[str, Any], second: str, value: str, seed: int = 0) -> int:
    """How many of RESAMPLINGS halves of the items give p < 0.05 for an engine of equal quality.

    Args:
        value: "score" or "nats".
    """
    chance, alarms = np.random.default_rng(seed), 0
    answers = [item["answers"] for task in found["items"].values() for item in task]
    for _ in range(RESAMPLINGS):
        half = chance.choice(len(answers), len(answers) // 2, replace=False)
        pair = [[answers[place][label][value] for place in half] for label in (FIRST, second)]
        alarms += paired_difference(*pair).p < 0.05
    return alarms


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--items", "count", type=int, default=200, show_default=True, help="Items of each kind.")
def main(out: Path, count: int) -> None:
    """Measure, and write what is worth keeping."""
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), count)
    alarms = {
        name: {value: false_alarms(found, name, value) for value in ("score", "nats")} for name in EQUALS
    }
    kept = {name: found[name] for name in KEPT} | {f"false_alarms_of_{RESAMPLINGS}": alarms}
    for row in kept["rows"]:
        row["lost"], row["won"] = len(row["lost"]), len(row["won"])
    out.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
