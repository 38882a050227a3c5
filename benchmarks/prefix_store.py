"""The prefix cache on disk: time to the first token of a long prompt, cold and from the disk, and steps of others.

    python -m benchmarks.prefix_store BUNDLE --tokens 8192 --out benchmarks/results/prefix-store

Each round opens a new session for the cold run and for the warm one, and runs a first step, as a server does. The files are in the page cache of the system, as
after a restart of the server. "steps of others" compares decode steps of one request while nothing is written, twice, while
the writer stores pieces as fast as the model computes prompts, and while it writes without a pause.
"""

import json
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from glm4_runtime import Session
from glm4_runtime.prefix_store.limits import DEFAULT_BYTES
from glm4_runtime.prefix_store.piece import TOKENS
from glm4_runtime.prefix_store.single import prefill
from glm4_runtime.prefix_store.store import PrefixStore
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.session.warm_up import warm_up

STEPS = 40


def first_token(bundle: Path, folder: Path, ids: list[int]) -> tuple[float, list[int]]:
    """Seconds to the first token of a new session, and eight tokens."""
    with Session.open(bundle, max_batch_size=1) as session:
        warm_up(session)
        store = PrefixStore(folder, DEFAULT_BYTES, session)
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        began, tokens, first = time.perf_counter(), [], 0.0
        for token in session.generate(ids, params, store=store):
            first = first or time.perf_counter() - began
            tokens.append(token.id)
        store.close()
    return first, tokens


def read_seconds(folder: Path) -> float:
    """Seconds to read all files, one after the other."""
    began = time.perf_counter()
    for path in folder.rglob("*.safetensors"):
        path.read_bytes()
    return time.perf_counter() - began


def step_seconds(session: Session, slot: int) -> float:
    """Median seconds of a decode step."""
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        session.decode_block({slot: 5})
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def steps_of_others(bundle: Path, folder: Path, ids: list[int]) -> dict[str, float]:
    """Median seconds of a step: without writes, again without, and with two paces of writes."""
    with Session.open(bundle, max_batch_size=1) as session:
        store = PrefixStore(folder, DEFAULT_BYTES, session)
        began = time.perf_counter()
        prefill(session, None, 0, ids[:512])
        pace = (time.perf_counter() - began) * TOKENS / 512  # seconds in which the model computes a piece
        chain = store.chain(np.array(ids[:512]), None, "")
        block = session.read_positions(0, 0, TOKENS)

        def write(over: threading.Event, pause: float) -> None:
            while not over.wait(pause):
                store.save(chain, 0, block)
                store.flush()

        found = {name: step_seconds(session, 0) for name in ("quiet", "quiet again")}
        for name, pause in (("a prompt's pace", pace), ("without a pause", 0.0)):
            over = threading.Event()
            writer = threading.Thread(target=write, args=(over, pause))
            writer.start()
            found[name] = step_seconds(session, 0)
            over.set()
            writer.join()
        store.close()
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--tokens", type=int, default=8192, show_default=True, help="Tokens of the prompt.")
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Write OUT.json.")
def main(bundle: Path, tokens: int, rounds: int, out: Path) -> None:
    """Measure the prefix cache on disk with BUNDLE."""
    ids = np.random.default_rng(0).integers(10, 2000, tokens).tolist()
    runs: list[dict[str, Any]] = []
    for _ in range(rounds):
        folder = Path(tempfile.mkdtemp()) / "cache"
        try:
            cold, expected = first_token(bundle, folder, ids)
            reading = read_seconds(folder)
            warm, found = first_token(bundle, folder, ids)
            steps = steps_of_others(bundle, folder, ids)
            size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        finally:
            shutil.rmtree(folder.parent)
        runs.append(
            {
                "cold": cold,
                "warm": warm,
                "read": reading,
                "equal": found == expected,
                "bytes": size,
                "steps": steps,
            }
        )
        click.echo(json.dumps(runs[-1]))
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    about = {name: manifest[name] for name in ("target", "precision", "kv_cache", "model")}
    out.with_suffix(".json").write_text(
        json.dumps({"bundle": about, "tokens": tokens, "rounds": runs}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
