"""What exact answers would cost on target ``ort``: every decode step padded to all slots of the session.

    python -m benchmarks.fixed_batch BUNDLE ... --out benchmarks/results/fixed-batch.json

The size of a step changes the rounding of a product, so that a request alone and the same request in a crowd may get
different tokens. With steps of one size they get the same bits. The price is paid by steps with fewer requests than
slots. Steps of each size are timed in turn; "again" is a second series of one request, and tells the noise.
"""

import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from glm4_runtime import Session

CONTEXT, ROUNDS = 64, 300


def figures(bundle: Path, slots: int) -> dict[str, Any]:
    """Milliseconds of a step with one request, and with as many as there are slots; and whether sizes change bits."""
    with Session.open(bundle, max_batch_size=slots) as session:
        rng = np.random.default_rng(0)
        prompts = rng.integers(4, session.manifest.model.vocab_size - 20, (slots, CONTEXT))
        sizes = {"one": 1, "again": 1, "half": slots // 2, "all": slots}
        for slot, prompt in enumerate(prompts):
            session.prefill(slot, prompt)
        times: dict[str, list[float]] = {name: [] for name in sizes}
        for _ in range(ROUNDS):
            for name, size in sizes.items():
                began = time.perf_counter()
                session.decode_block(dict.fromkeys(range(size), 5))
                times[name].append(time.perf_counter() - began)
                for slot in range(size):
                    session.truncate(slot, CONTEXT)
        exact = [_row(session, range(slots), 5), _row(session, range(slots), 6), _row(session, range(1), 5)]
        medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "precision": session.manifest.precision,
        "step_ms": {name: round(1000 * found, 4) for name, found in medians.items()},
        "all_over_one": round(medians["all"] / medians["one"], 3),
        "half_over_one": round(medians["half"] / medians["one"], 3),
        "again_over_one": round(medians["again"] / medians["one"], 3),
        "same_bits_with_other_neighbours": bool((exact[0] == exact[1]).all()),
        "same_bits_alone": bool((exact[0] == exact[2]).all()),
    }


def _row(session: Session, slots: range, neighbours: int) -> Any:
    """The logits of slot 0 after one token, beside others."""
    found, logits = session.decode_block({slot: 5 if slot == 0 else neighbours for slot in slots})
    row = logits[found.index(0)].copy()
    for slot in slots:
        session.truncate(slot, CONTEXT)
    return row


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--slots", default=8, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Keep the figures in this JSON file.")
def main(bundles: tuple[Path, ...], slots: int, out: Path | None) -> None:
    told = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} before",
        "versions": {"onnxruntime": version("onnxruntime")},
        "command": f"python -m benchmarks.fixed_batch BUNDLE ... --slots {slots}",
        "slots": slots,
        "bundles": [figures(bundle, slots) for bundle in bundles],
    }
    text = json.dumps(told, indent=2)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
