"""Measures one bundle on this machine: loading, prefill and decode on random tokens, and memory."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm4_deploy.adapters import apply_adapter
from glm4_exporters.peak_memory import peak_memory
from glm4_runtime import Session
from glm4_runtime.bundle import Manifest, read_manifest
from glm4_runtime.errors import RequestError
from glm4_runtime.progress import Progress, silent


class Runner:
    """One session, with the two operations that are timed: a prompt, and steps of a batch."""

    def __init__(self, session: Session, seed: int = 0) -> None:
        self.session = session
        self._random = np.random.default_rng(seed)

    def tokens(self, count: int) -> list[int]:
        ids: list[int] = self._random.integers(0, self.session.manifest.model.vocab_size, count).tolist()
        return ids

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds to run a prompt in an empty slot, until the logits of its last position."""
        start = time.perf_counter()
        self.session.prefill(0, ids)
        seconds = time.perf_counter() - start
        self.session.release(0)
        return seconds

    def fill(self, ids: Sequence[int], batch: int) -> None:
        """Fill several slots with one prompt; the steps then read as much memory as with different prompts."""
        self.session.prefill(0, ids)
        for slot in range(1, batch):
            self.session.copy_prefix(0, slot, len(ids))

    def decode(self, batch: int, steps: int) -> float:
        """Seconds for ``steps`` greedy steps of the filled slots 0 ... batch - 1. Afterwards the slots are as before."""
        length = self.session.length(0)
        tokens = dict(enumerate(self.tokens(batch)))
        start = time.perf_counter()
        for _ in range(steps):
            slots, logits = self.session.decode_block(tokens)
            tokens = dict(zip(slots, logits.argmax(-1).tolist(), strict=True))
        seconds = time.perf_counter() - start
        for slot in range(batch):
            self.session.truncate(slot, length)
        return seconds

    def empty(self) -> None:
        for slot in range(self.session.max_batch_size):
            self.session.release(slot)


@dataclass(frozen=True)
class BenchOptions:
    """What to time.

    Attributes:
        prefill: lengths of prompts.
        batch: how many sequences decode together, each after ``context`` tokens, for ``steps`` tokens.
        rounds: measured rounds, after one that is not counted.
        threads: of the session; all cores by default.
        lora: a LoRA adapter of all sequences, as a folder or a name on the hub. None: the base model.
    """

    prefill: Sequence[int] = (512, 2048)
    batch: Sequence[int] = (1, 4, 8)
    context: int = 512
    steps: int = 32
    rounds: int = 5
    threads: int | None = None
    lora: str | None = None


Rates = Mapping[str, Mapping[str, list[float]]]


def bench(
    bundle: str | Path, options: BenchOptions = BenchOptions(), progress: Progress = silent
) -> dict[str, Any]:
    """Measure a causal LM's bundle. Every figure is the median of the rounds, with minimum and maximum.

    Returns:
        Loading in seconds, prefill and decode in tokens per second, weights and peak memory in bytes.

    Raises:
        Glm4Error: the bundle cannot be opened, or is too small for these lengths or batches.
    """
    manifest = read_manifest(bundle)
    _check(manifest, max(options.prefill), max(options.batch), options.context + options.steps)
    progress("load", 0, 0)
    start = time.perf_counter()
    with Session.open(bundle, max_batch_size=max(options.batch), threads=options.threads) as session:
        apply_adapter(session, options.lora)
        runner = Runner(session)
        runner.prefill(runner.tokens(1))
        load = time.perf_counter() - start
        rates = _rates(runner, options, progress)
        return {
            "bundle": str(bundle),
            "target": manifest.target,
            "precision": manifest.precision,
            "provider": session.provider,
            "threads": options.threads,
            "lora": options.lora,
            "rounds": options.rounds,
            "context": options.context,
            "steps": options.steps,
            "load_seconds": load,
            "weight_bytes": _weight_bytes(manifest),
            "peak_bytes": peak_memory(),
            **{kind: {size: _spread(r) for size, r in figures.items()} for kind, figures in rates.items()},
        }


def _rates(runner: Runner, options: BenchOptions, progress: Progress) -> Rates:
    """Tokens per second of every round, for each length and each batch."""
    rates: Rates = {
        "prefill": {str(n): [] for n in options.prefill},
        "decode": {str(n): [] for n in options.batch},
    }
    for number in range(options.rounds + 1):
        progress("measure", number, options.rounds + 1)
        one = _round(runner, options)
        if number:  # the first run packs weights and touches memory
            for kind, figures in one.items():
                for size, rate in figures.items():
                    rates[kind][size].append(rate)
    progress("measure", options.rounds + 1, options.rounds + 1)
    return rates


def _round(runner: Runner, options: BenchOptions) -> Mapping[str, Mapping[str, float]]:
    """One round: tokens per second for each length and each batch."""
    prompts = {str(n): n / runner.prefill(runner.tokens(n)) for n in options.prefill}
    runner.fill(runner.tokens(options.context), max(options.batch))
    decodes = {str(n): n * options.steps / runner.decode(n, options.steps) for n in options.batch}
    runner.empty()
    return {"prefill": prompts, "decode": decodes}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _weight_bytes(manifest: Manifest) -> int:
    return sum(manifest.files[name].bytes for name in manifest.engine_files or manifest.weight_files)


def _check(manifest: Manifest, prompt: int, batch: int, decoded: int) -> None:
    """Refuse impossible lengths and batches before anything is loaded."""
    if manifest.task != "causal-lm":
        raise RequestError(
            f"bench measures prefill and decode, and this bundle is for {manifest.task}; "
            "export the checkpoint with --task causal-lm"
        )
    for name, asked, limit in (
        ("max-seq-len", max(prompt, decoded), manifest.limits.max_seq_len),
        ("max-batch-size", batch, manifest.limits.max_batch_size),
    ):
        if asked > limit:
            raise RequestError(
                f"this needs {name} {asked}, and the bundle has {limit}; ask for less, "
                f"or export it again with --{name} {asked}"
            )
