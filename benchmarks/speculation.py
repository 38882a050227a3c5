"""Prompt lookup on text editing: tokens per second with drafts and without, and that the tokens are the same.

    python benchmarks/speculation.py BUNDLE --out benchmarks/results/speculation-int8

The prompt is a text of 400 tokens, the answer the same text with one token in 25 replaced, which is what an
editing model writes. Its logits are dictated, so that it can be any model: the session runs every step in
full, and then the row of the token that is to come is raised. Greedy, one request, one line per repetition
and mode. "random" is the counter-check: an answer that shares nothing with its prompt.
"""

import json
import os
import platform
import statistics
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from glm4_runtime import SamplingParams, Session
from glm4_runtime.scheduler import Event, Failed, Generated, Request, Scheduler

TOKENS = 400
REPLACED = 25


class Dictated:
    """A session whose next token after position n is ``script[n]``."""

    def __init__(self, session: Session, script: list[int]) -> None:
        self._session, self._script = session, script

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def prefill(self, slot: int, token_ids: Any, logits: Any = "last") -> np.ndarray:
        rows = self._session.prefill(slot, token_ids, logits)
        end = self._session.length(slot)
        for row, position in zip(rows, range(end - len(rows), end), strict=True):
            self._raise(row, position)
        return rows

    def decode_block(self, tokens: dict[int, int]) -> tuple[list[int], np.ndarray]:
        slots, rows = self._session.decode_block(tokens)
        for slot, row in zip(slots, rows, strict=True):
            self._raise(row, self._session.length(slot) - 1)
        return slots, rows

    def run_block(self, tokens: dict[int, Any]) -> tuple[list[int], np.ndarray]:
        slots, blocks = self._session.run_block(tokens)
        for slot, rows in zip(slots, blocks, strict=True):
            end = self._session.length(slot)
            for row, position in zip(rows, range(end - len(tokens[slot]), end), strict=False):
                self._raise(row, position)
        return slots, blocks

    def _raise(self, row: np.ndarray, position: int) -> None:
        if position + 1 < len(self._script):
            row[self._script[position + 1]] = row.max() + 1


def run(session: Session, prompt: list[int], answer: list[int], speculation: bool) -> dict[str, Any]:
    """One request alone; seconds count from the first token to the last."""
    dictated: Any = Dictated(session, prompt + answer)
    scheduler = Scheduler(dictated, prefix_cache=False, speculation=speculation)
    ids, times, done = [], [], threading.Event()

    def note(event: Event) -> None:
        if isinstance(event, Generated):
            ids.append(event.token.id)
            times.append(time.perf_counter())
        if isinstance(event, Failed) or (isinstance(event, Generated) and event.token.finish_reason):
            done.set()

    params = SamplingParams(max_tokens=len(answer), ignore_eos=True)
    scheduler.submit(Request(tuple(prompt), params, logprobs=False), note)
    scheduler.start()
    done.wait()
    scheduler.stop()
    stats = scheduler.stats()
    if ids != answer:
        raise SystemExit("the tokens are not those that were dictated: drafts changed them")
    return {
        "tokens_per_second": (len(ids) - 1) / (times[-1] - times[0]),
        "steps": stats.steps,
        "drafted": stats.drafted_tokens,
        "accepted": stats.accepted_tokens,
    }


def texts(vocab: int) -> dict[str, tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    text, other = rng.integers(10, vocab - 10, (2, TOKENS))
    edited = text.copy()
    edited[REPLACED // 2 :: REPLACED] = rng.integers(10, vocab - 10, len(edited[REPLACED // 2 :: REPLACED]))
    return {"editing": (text.tolist(), edited.tolist()), "random": (text.tolist(), other.tolist())}


@click.command(help=__doc__.partition("\n")[0])
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", type=int, help="Threads within one operator; all cores where absent.")
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json and OUT.md.")
def main(bundle: Path, rounds: int, threads: int | None, out: Path | None) -> None:
    rows = []
    with Session.open(bundle, threads=threads) as session:
        model = session.manifest.model
        for kind, (prompt, answer) in texts(model.vocab_size).items():
            runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
            for _ in range(rounds):
                for speculation, list_ in runs.items():  # alternating, so that both see the same machine
                    list_.append(run(session, prompt, answer, speculation))
            plain, drafted = (statistics.median(one["tokens_per_second"] for one in runs[on]) for on in runs)
            last = runs[True][-1]
            rows.append(
                {
                    "answer": kind,
                    "plain tokens/s": round(plain, 1),
                    "with drafts": round(drafted, 1),
                    "times": round(drafted / plain, 2),
                    "steps": last["steps"],
                    "drafted": last["drafted"],
                    "accepted": last["accepted"],
                }
            )
    lines = [
        "# Prompt lookup",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {threads or 'all'} threads, onnxruntime {version('onnxruntime')}, load average {os.getloadavg()[0]:.1f}.",
        f"{model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}, "
        f"{session.manifest.precision}; medians of {rounds} alternating rounds, {TOKENS} tokens each.",
        "",
        "    python benchmarks/speculation.py BUNDLE",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows),
    ]
    click.echo("\n".join(lines))
    if out is not None:
        out.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
        out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
