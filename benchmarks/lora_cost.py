"""What LoRA adapters at run time cost: decode steps with and without them, beside a repeat of the base.

    python benchmarks/make_checkpoint.py --size 9b-4layers CHECKPOINT
    glm4-deploy export CHECKPOINT BUNDLE --target cpu --lora-slots 8 --no-parity
    python benchmarks/lora_cost.py BUNDLE --out benchmarks/results/lora-cost

Each round runs the cases of a group in turn, on one session with eight adapters of random matrices for all products.
A case is the adapters of its sequences. A ratio is a round's time of a case over the same round's time of the base; the
result is the median of the rounds' ratios. "base again" is the base a second time: its ratio shows the noise. "nothing
loaded" runs on a second session of the same bundle that has loaded no adapter.
"""

import json
import os
import platform
import statistics
import tempfile
import time
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
CONTEXT, PROMPT = 4, 64


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


NOTHING_LOADED = "nothing loaded"
EVERY = [f"adapter {i}" for i in range(ADAPTERS)]
# By group: the adapters of the sequences of each case. A group runs at once; its first case is the base.
GROUPS: dict[str, dict[str, list[str | None]]] = {
    "decode 1": {"base": [None], "base again": [None], "one adapter": EVERY[:1]},
    "decode 8": {
        "base": [None] * 8,
        "base again": [None] * 8,
        "one adapter": EVERY[:1] * 8,
        "eight adapters": [*EVERY],
    },
    "decode 8, mixed": {
        "base": [None] * 8,
        "base again": [None] * 8,
        "four adapters, four without": [*EVERY[:4], None, None, None, None],
    },
    "prompt of 64": {"base": [None], "base again": [None], "one adapter": EVERY[:1]},
}


def run(session: Session, group: str, adapters: list[str | None], steps: int) -> float:
    """Seconds of a prompt, or of a decode step of several sequences."""
    ids = np.random.default_rng(0).integers(0, session.manifest.model.vocab_size, PROMPT).tolist()
    decodes = group.startswith("decode")
    first: dict[str | None, int] = {}
    start = time.perf_counter()
    for slot, adapter in enumerate(adapters):
        if adapter in first:
            session.copy_prefix(first[adapter], slot, CONTEXT)
        else:
            session.use_adapter(slot, adapter)
            session.prefill(slot, ids[:CONTEXT] if decodes else ids)
        first.setdefault(adapter, slot)
    if decodes:
        tokens = dict.fromkeys(range(len(adapters)), 7)
        session.decode_block(tokens)
        start = time.perf_counter()
        for _ in range(steps):
            session.decode_block(tokens)
    seconds = time.perf_counter() - start
    for slot in range(len(adapters)):
        session.release(slot)
    return seconds / (steps if decodes else 1)


def measure(session: Session, empty: Session, group: str, rounds: int, steps: int) -> dict[str, Any]:
    """Median milliseconds of each case, and its ratio to the base with the quartiles of the rounds' ratios.

    Args:
        empty: a session of the same bundle that has loaded no adapter.
    """
    cases = {name: (session, adapters) for name, adapters in GROUPS[group].items()}
    cases[NOTHING_LOADED] = empty, GROUPS[group]["base"]
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, (opened, adapters) in cases.items():
            seconds = run(opened, group, adapters, steps)
            if number:  # the first round touches memory
                times[name].append(seconds)
    result = {}
    for name, own in times.items():
        ratios = [one / other for one, other in zip(own, times["base"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        result[name] = {
            "milliseconds": round(1e3 * statistics.median(own), 3),
            "ratio": round(statistics.median(ratios), 4),
            "quartiles": [round(low, 4), round(high, 4)],
        }
    return result


@click.command(help=__doc__.partition("\n")[0])
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--group", "groups", type=click.Choice(list(GROUPS)), multiple=True, help="Default: all groups."
)
@click.option("--rank", default=16, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--steps", default=4, show_default=True, help="Decode steps of a case in each round.")
@click.option("--threads", type=int, help="Threads within one operator; all cores where absent.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Add the result to OUT.json, under the bundle's form."
)
def main(
    bundle: Path,
    groups: tuple[str, ...],
    rank: int,
    rounds: int,
    steps: int,
    threads: int | None,
    out: Path | None,
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Session.open(bundle, threads=threads, max_batch_size=8) as session,
        Session.open(bundle, threads=threads, max_batch_size=8) as empty,
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
            "groups": {group: measure(session, empty, group, rounds, steps) for group in groups or GROUPS},
        }
    key = f"{manifest.target} {manifest.precision}"
    click.echo(json.dumps({key: found}, indent=2))
    if out is not None:
        path = out.with_suffix(".json")
        before = json.loads(path.read_text()) if path.exists() else {}
        found["groups"] = {**before.get(key, {}).get("groups", {}), **found["groups"]}
        path.write_text(json.dumps({**before, key: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
