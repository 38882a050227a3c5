"""What structured output costs per token: applying a mask to logits, and working out the next one.

    glm4-deploy export demo/glm4-tiny BUNDLE --precision fp32
    python benchmarks/mask_cost.py BUNDLE --out benchmarks/results/mask-cost

Applying is on the critical path: by adding a row of 0 and -inf, as the runtime does, and by setting the
forbidden logits, for comparison; at the vocabulary of the released checkpoints. Working out a mask runs beside
the model's step: llguidance's time on the bundle's own vocabulary, along replies to a JSON schema that are
chosen at random among what the mask allows.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np

from glm4_runtime.bundle import read_manifest
from glm4_runtime.structured import AnswerFormat, GrammarCompiler, ReplyFormat
from glm4_runtime.tokenizer import Tokenizer

VOCABULARY = 151552
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "count": {"type": "integer", "minimum": 0, "maximum": 9999},
    },
    "required": ["name", "tags", "count"],
}


def apply_microseconds(repeats: int) -> dict[str, float]:
    """Median time per row of logits, the two ways taking turns."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(VOCABULARY).astype(np.float32)
    forbidden = rng.random(VOCABULARY) < 0.5
    bias = np.where(forbidden, np.float32(-np.inf), np.float32(0))
    ways: dict[str, Callable[[np.ndarray], object]] = {
        "added": lambda row: np.add(row, bias, out=row),
        "set": lambda row: np.copyto(row, np.float32(-np.inf), where=forbidden),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            row = logits.copy()
            start = time.perf_counter()
            way(row)
            times[name].append(time.perf_counter() - start)
    return {name: round(1e6 * statistics.median(values), 1) for name, values in times.items()}


def advance_microseconds(bundle: Path, replies: int) -> dict[str, float]:
    """Time per token to work out the next mask, llguidance's part and the row's."""
    manifest, times = read_manifest(bundle), []
    model = manifest.model
    compiler = GrammarCompiler(
        Tokenizer.from_folder(bundle), model.vocab_size, model.eos_token_ids, times.append
    )
    rng = np.random.default_rng(1)
    for _ in range(replies):
        mask = compiler.compile(ReplyFormat(AnswerFormat("json_schema", SCHEMA), turn=False), thinking=False)
        for _ in range(256):
            logits = np.zeros(model.vocab_size, np.float32)
            mask.apply(logits)
            mask.advance(int(rng.choice(np.flatnonzero(np.isfinite(logits)))))
            if mask.finished:
                break
    found = np.array(times) * 1e6
    percentiles = {f"p{p}": round(float(np.percentile(found, p)), 1) for p in (50, 90, 99)}
    return {"vocabulary": model.vocab_size, "tokens": len(found), **percentiles}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--repeats", default=500, show_default=True)
@click.option("--replies", default=50, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json.")
def main(bundle: Path, repeats: int, replies: int, out: Path | None) -> None:
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "numpy": version("numpy"),
        "llguidance": version("llguidance"),
        "apply_microseconds": {"vocabulary": VOCABULARY, **apply_microseconds(repeats)},
        "advance_microseconds": advance_microseconds(bundle, replies),
    }
    text = json.dumps(result, indent=2)
    click.echo(text)
    if out is not None:
        out.with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
