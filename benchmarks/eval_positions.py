"""Perplexity by position with and without YaRN, for each type of KV cache that the CPU runs.

    python benchmarks/eval_positions.py --out benchmarks/results/eval-positions.json
    python benchmarks/eval_positions.py --target cpu --out benchmarks/results/eval-positions-cpu.json

The demo checkpoint was trained up to 2048 positions. Two copies have room for 4096: "plain" with the same rotary
frequencies, and "yarn" with YaRN's factor 2.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from glm4_deploy.cli import cli
from glm4_deploy.pipeline import ExportOptions, export

DEMO = Path(__file__).parents[1] / "demo"
TRAINED, ROOM = 2048, 4096
YARN = {"rope_type": "yarn", "factor": ROOM / TRAINED, "original_max_position_embeddings": TRAINED}
SCALINGS: dict[str, dict[str, Any]] = {"plain": {}, "yarn": YARN}
CACHES: dict[str, dict[str, Any]] = {
    "f32": {"precision": "fp32"},
    "f16": {"precision": "fp16"},
    "kv8": {"precision": "fp32", "kv_cache": "int8"},
}
OF_CPU: dict[str, dict[str, Any]] = {
    name: {"target": "cpu", "precision": "int8", "kv_cache": name}
    for name in ("fp32", "fp16", "bf16", "int8")
}
TABLES = {"ort": CACHES, "cpu": OF_CPU}
GATES = ("*/glm4_positions: -0.02 nats at p < 0.05",)
KEPT = ("engines", "selection", "perplexity_by_position", "rows", "gates", "tools")  # of results.json


def stretched(folder: Path, scaling: dict[str, Any]) -> Path:
    """A copy of the demo checkpoint with room for more positions."""
    shutil.copytree(DEMO / "glm4-tiny", folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["max_position_embeddings"] = ROOM
    config["rope_parameters"] |= scaling
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": ROOM}), "utf-8")
    return folder


def measured(
    folder: Path, caches: Sequence[str] = (), items: int = 200, target: str = "ort"
) -> dict[str, Any]:
    """Export all bundles into ``folder``, and return what ``eval`` writes to results.json."""
    bundles = []
    for name, scaling in SCALINGS.items():
        checkpoint = stretched(folder / name, scaling)
        for cache in caches or TABLES[target]:
            bundle = folder / f"{name}-{cache}"
            export(checkpoint, bundle, ExportOptions(**TABLES[target][cache], parity=False))
            bundles.append(f"{bundle.name}={bundle}")
    gates = [word for gate in GATES for word in ("--gate", gate)]
    options = ["--text", DEMO / "heldout.txt", "--items", items, "--output", folder / "out", *gates]
    cli.main(["eval", *bundles, "--tasks", "glm4_positions", *map(str, options)], standalone_mode=False)
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text("utf-8"))
    return found


@click.command()
@click.option("--target", type=click.Choice(list(TABLES)), default="ort", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(target: str, out: Path) -> None:
    """Measure, and write what is worth keeping."""
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), target=target)
    for engine in found["engines"]:
        engine["where"] = Path(engine["where"]).name
    found["selection"]["text"] = "demo/heldout.txt"
    out.write_text(json.dumps({name: found[name] for name in KEPT}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
