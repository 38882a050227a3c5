"""Attack what compiles formats and renders templates with generated input, each kept by its seed.

    python -m benchmarks.attacks_grammar demo/glm4-tiny --minutes 10

A process of its own makes and tries one input after the other, as a server would: formats are compiled and followed
for some tokens, on a thread with a small stack, and templates are compiled and rendered. An input is a finding where
that process dies, takes too long for one input, grows too large, or raises anything but a refusal. ``--out`` keeps the
counts, the seeds and the versions. A finding is repeated by its kind and seed:

    python -m benchmarks.attacks_grammar demo/glm4-tiny --kind lark --seed 1234 --count 1
"""

import faulthandler
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.attack_inputs import KINDS
from glm4_runtime.chat_template import ChatTemplate
from glm4_runtime.errors import BundleError, QueueFullError, RequestError
from glm4_runtime.stacks import run_with_stack
from glm4_runtime.structured import AnswerFormat, GrammarCompiler, ReplyFormat
from glm4_runtime.tokenizer import Tokenizer
from glm4_runtime.workers.child import resident

# What one input may cost: seconds by the clock, on a busy machine, and of one mask; bytes of the process in all.
LONGEST, LONGEST_MASK = 30.0, 0.5
MOST_GROWN = 2**30
# Seconds after which the process is ended, with the traces of its threads, for what never comes back.
HANGS = 4 * LONGEST
STEPS = 40
FOLLOWING_STACK = 2**19
CONVERSATION = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
ROOT = Path(__file__).parents[1]
REFUSALS = (RequestError, BundleError, QueueFullError)


class FindingError(Exception):
    """An input that cost too much; the message says how."""


class Target:
    """Tries one input, as the server would."""

    def __init__(self, folder: Path) -> None:
        tokenizer = Tokenizer.from_folder(folder)
        self._size = tokenizer.vocab_size
        self._ends = [tokenizer.vocab_size - 1]
        self._compiler = GrammarCompiler(tokenizer, self._size, self._ends)

    def attempt(self, kind: str, seed: int) -> str:
        """What became of the input: "refused", "compiled" or "rendered". Raises :class:`FindingError`."""
        rng = random.Random(f"{kind} {seed}")
        made = KINDS[kind](rng)
        began = time.monotonic()
        try:
            done = self._render(made) if kind == "template" else self._compile(kind, made, rng)
        except REFUSALS as error:
            if len(str(error)) > 500 or "\n" in str(error):
                raise FindingError(f"a refusal of {len(str(error))} characters") from error
            done = "refused"
        if time.monotonic() - began > LONGEST:
            raise FindingError(f"{time.monotonic() - began:.0f} s")
        return done

    def _render(self, source: str) -> str:
        ChatTemplate(source).render(CONVERSATION)
        return "rendered"

    def _compile(self, kind: str, definition: object, rng: random.Random) -> str:
        names = {"schema": "json_schema", "lark": "grammar", "regex": "regex"}
        answer = AnswerFormat(names[kind], definition)  # type: ignore[arg-type]
        mask = self._compiler.compile(ReplyFormat(answer, turn=False), thinking=rng.random() < 0.2)
        run_with_stack(lambda: self._follow(mask.copy(), rng), FOLLOWING_STACK)
        return "compiled"

    def _follow(self, mask: object, rng: random.Random) -> None:
        for _ in range(STEPS):
            if mask.failure is not None or mask.finished:  # type: ignore[attr-defined]
                return
            logits = np.zeros(self._size, np.float32)
            mask.apply(logits)  # type: ignore[attr-defined]
            allowed = np.flatnonzero(logits == 0)
            if not len(allowed):
                return
            began = time.thread_time()
            mask.advance(int(allowed[rng.randrange(len(allowed))]))  # type: ignore[attr-defined]
            if time.thread_time() - began > LONGEST_MASK:
                raise FindingError(f"a mask took {time.thread_time() - began:.2f} s")


def attempts(folder: Path, kinds: list[str], seed: int, count: int | None, until: float) -> None:
    """Try inputs until the time is over; a line before each says which, and a line after what became of it."""
    target, begun = Target(folder), resident()
    number = 0
    while (count is None or number < count) and time.time() < until:
        kind = kinds[(seed + number) % len(kinds)]
        print("try", kind, seed + number, flush=True)
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            print("was", target.attempt(kind, seed + number), flush=True)
            if resident() - begun > MOST_GROWN:
                raise FindingError(f"the process grew by {(resident() - begun) >> 20} MiB")
        except FindingError as finding:
            print("finding", finding, flush=True)
        faulthandler.cancel_dump_traceback_later()
        number += 1


def hunted(command: list[str], seed: int, until: float) -> tuple[Counter[str], list[str], int]:
    """Outcomes and findings of a child that is started again after whatever ends it, and the next seed."""
    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    last = "nothing"
    with subprocess.Popen(
        [*command, "--seed", str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            what, _, rest = line.strip().partition(" ")
            if what == "try":
                last, seed = rest, int(rest.split()[1]) + 1
            elif what == "was":
                outcomes[f"{last.split()[0]} {rest}"] += 1
            else:
                findings.append(f"{last}: {rest}")
        code = child.wait()
    if code and time.time() < until:
        findings.append(f"{last}: the process ended with {code}")
    return outcomes, findings, seed


def child_command(folder: Path, kinds: list[str], *options: str) -> list[str]:
    """The command of a child that tries inputs in its own process."""
    chosen = [part for kind in kinds for part in ("--kind", kind)]
    return [sys.executable, "-m", "benchmarks.attacks_grammar", str(folder.resolve()), *chosen, *options]


def hunt(folder: Path, kinds: list[str], seed: int, minutes: float) -> dict[str, Any]:
    """Try inputs for some minutes; what came of them, and how to repeat it."""
    until, first = time.time() + 60 * minutes, seed
    command = child_command(folder, kinds, "--until", str(until))
    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    while time.time() < until:
        more, found, seed = hunted(command, seed, until)
        outcomes += more
        findings += found
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: version(name) for name in ("llguidance", "jinja2", "tokenizers")},
        "command": f"python -m benchmarks.attacks_grammar {folder} --seed {first} --minutes {minutes:g} "
        + " ".join(f"--kind {kind}" for kind in kinds),
        "seeds": [first, seed - 1],
        "inputs": outcomes.total(),
        "outcomes": dict(sorted(outcomes.items())),
        "findings": findings,
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="All kinds by default.")
@click.option(
    "--seed", default=1, show_default=True, help="Of the first input; the next have the next numbers."
)
@click.option("--count", type=int, help="At most so many inputs, in this process.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the figures in this JSON file.")
@click.option("--until", type=float, hidden=True)
def main(
    folder: Path,
    minutes: float,
    kinds: tuple[str, ...],
    seed: int,
    count: int | None,
    out: Path | None,
    until: float | None,
) -> None:
    chosen = list(kinds or KINDS)
    if count is not None or until is not None:
        attempts(folder, chosen, seed, count, until or time.time() + 60 * minutes)
        return
    figures = hunt(folder, chosen, seed, minutes)
    text = json.dumps(figures, indent=2)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")
    sys.exit(bool(figures["findings"]))


if __name__ == "__main__":
    main()
