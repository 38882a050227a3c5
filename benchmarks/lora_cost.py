"""What LoRA adapters at run time cost: decode steps with and without them, beside a repeat of the base.

    python benchmarks/make_checkpoint.py --size 9b-4layers CHECKPOINT
    glm4-deploy export CHECKPOINT BUNDLE --target cpu --lora-slots 8 --no-parity
    python benchmarks/lora_cost.py BUNDLE --out benchmarks/results/lora-cost

Each round runs all cases in turn, on one session with eight adapters of random matrices for all products. A case is a
number of sequences and their adapters. A ratio is a round's time of a case over the same round's time of the base; the
result is the median of the rounds' ratios. "base again" is the base a second time: its ratio shows the noise.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors.numpy import save_file

from glm4_runtime.bundle import read_manifest
from glm4_runtime.bundle.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from glm4_runtime.session import Session

ADAPTERS = 8
CONTEXT, PROMPT = 64, 256


def write_adapter(bundle: Path, folder: Path, rank: int, seed: int) -> Path:
    """A random adapter of all products of a layer, in float16."""
    slots, rng = read_manifest(bundle).adapter_slots, np.random.default_rng(seed)
    assert slots is not None
    tensors = {}
    for name, (outputs, inputs) in slots.matrices.items():
        if name != "lm_head":
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = rng.standard_normal(shape, np.float32) * 0.01
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = values.astype(np.float16)
    folder.mkdir()
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return folder


class Cases:
    """The timed cases, by name. Each runs once per call and returns seconds."""

    def __init__(self, session: Session, steps: int) -> None:
        self._session, self._steps = session, steps
        self._ids = np.random.default_rng(0).integers(0, session.manifest.model.vocab_size, PROMPT).tolist()

    def all(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """By name: the case that it is compared with, and the function that runs it."""
        every = [f"adapter {i}" for i in range(ADAPTERS)]
        found: dict[str, tuple[str, Callable[[], float]]] = {}
        for count in (1, 8):
            mixes = {
                "base": [None],
                "base again": [None],
                "one adapter": every[:1],
                **(
                    {"eight adapters": every, "four adapters, four without": [*every[:4], None]}
                    if count > 1
                    else {}
                ),
            }
            for name, mix in mixes.items():
                adapters = [mix[min(i, len(mix) - 1) if None in mix else i % len(mix)] for i in range(count)]
                found[f"batch {count}, {name}"] = f"batch {count}, base", self._decoding(adapters)
        for name, adapter in (("base", None), ("base again", None), ("one adapter", every[0])):
            found[f"prompt, {name}"] = "prompt, base", self._prompt(adapter)
        return found

    def _decoding(self, adapters: list[str | None]) -> Callable[[], float]:
        def run() -> float:
            session = self._session
            for slot, adapter in enumerate(adapters):
                session.use_adapter(slot, adapter)
                session.prefill(slot, self._ids[:CONTEXT])
            tokens = dict.fromkeys(range(len(adapters)), 7)
            session.decode_block(tokens)
            start = time.perf_counter()
            for _ in range(self._steps):
                session.decode_block(tokens)
            seconds = time.perf_counter() - start
            for slot in range(len(adapters)):
                session.release(slot)
            return seconds / self._steps

        return run

    def _prompt(self, adapter: str | None) -> Callable[[], float]:
        def run() -> float:
            self._session.use_adapter(0, adapter)
            start = time.perf_counter()
            self._session.prefill(0, self._ids)
            seconds = time.perf_counter() - start
            self._session.release(0)
            return seconds

        return run


def measure(session: Session, rounds: int, steps: int) -> dict[str, Any]:
    """Median seconds of each case, and its ratio to the base with the quartiles of the rounds' ratios."""
    cases = Cases(session, steps).all()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, (_, run) in cases.items():
            seconds = run()
            if number:  # the first round touches memory
                times[name].append(seconds)
    result = {}
    for name, (base, _) in cases.items():
        ratios = sorted(own / other for own, other in zip(times[name], times[base], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        result[name] = {
            "milliseconds": round(1e3 * statistics.median(times[name]), 3),
            "ratio": round(statistics.median(ratios), 4),
            "quartiles": [round(low, 4), round(high, 4)],
        }
    return result


@click.command(help=__doc__.partition("\n")[0])
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--rank", default=16, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--steps", default=8, show_default=True, help="Decode steps of a case in each round.")
@click.option("--threads", type=int, help="Threads within one operator; all cores where absent.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Add the result to OUT.json, under the bundle's form."
)
def main(bundle: Path, rank: int, rounds: int, steps: int, threads: int | None, out: Path | None) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Session.open(bundle, threads=threads, max_batch_size=8) as session,
    ):
        start = time.perf_counter()
        for i in range(ADAPTERS):
            session.load_adapter(f"adapter {i}", write_adapter(bundle, Path(folder) / str(i), rank, i))
        loading = time.perf_counter() - start
        manifest = session.manifest
        found = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {threads or len(os.sched_getaffinity(0))} threads",
            "onnxruntime": version("onnxruntime"),
            "model": f"{manifest.model.num_layers} layers, hidden {manifest.model.hidden_size}",
            "rank": rank,
            "rounds": rounds,
            "seconds_to_write_and_load_eight": round(loading, 2),
            "adapter_bytes": session.adapter_bytes,
            "cases": measure(session, rounds, steps),
        }
    key = f"{manifest.target} {manifest.precision}"
    click.echo(json.dumps({key: found}, indent=2))
    if out is not None:
        path = out.with_suffix(".json")
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, key: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
