"""Stages on two Ray actors, one core each, against the same model without stages on one core.

    python -m benchmarks.stages STAGED WHOLE --wide STAGED WHOLE --out benchmarks/results/stages.json

STAGED and WHOLE are exports of one checkpoint with and without ``--stages``. All figures come from one run of interleaved
rounds; each round also measures the whole bundle twice, for the noise. The ideal gain of two groups in decoding is
t(n) / t(n / 2) of the whole bundle.

``--wide`` measures the hand-over: seconds of a step of one request in stages, less those without. Its bundles should
have few layers of the width in question.
"""

import json
import os
import platform
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Event, Failed, Generated, Request, Scheduler
from glm4_runtime.session import Session

CONTEXT = 64  # positions of each request before its decoding is measured
STEPS = 16
# The mix: requests that come at once, with their tokens of prompt and of answer.
MIX, MIX_PROMPT, MIX_ANSWER = 6, 256, 24

Seconds = dict[str, list[float]]


@contextmanager
def one_core(core: int) -> Iterator[None]:
    """Bind this thread to a core during the block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Bench:
    """One session, and what is timed on it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._random = np.random.default_rng(0)

    def _tokens(self, count: int) -> list[int]:
        found: list[int] = self._random.integers(0, 1000, count).tolist()
        return found

    def prompt(self, length: int) -> float:
        start = time.perf_counter()
        self.session.prefill(0, self._tokens(length))
        seconds = time.perf_counter() - start
        self.session.release(0)
        return seconds

    def decode(self, requests: int, groups: int) -> float:
        """Seconds per step of all requests, in groups that take turns."""
        slots = range(requests)
        self.session.prefill(0, self._tokens(CONTEXT))
        for slot in slots[1:]:
            self.session.copy_prefix(0, slot, CONTEXT)
        size = requests // groups
        flights = [self._begin(dict.fromkeys(slots[at : at + size], 5)) for at in range(0, requests, size)]
        for step in range(STEPS + 1):
            if step == 1:
                start = time.perf_counter()
            for place, flight in enumerate(flights):
                found, logits = flight.result()
                flights[place] = self._begin(dict(zip(found, logits.argmax(-1).tolist(), strict=True)))
        seconds = (time.perf_counter() - start) / STEPS
        for flight in flights:
            flight.result()
        for slot in slots:
            self.session.release(slot)
        return seconds

    def _begin(self, tokens: dict[int, int]) -> Any:
        return self.session.begin_decode(tokens)

    def mix(self) -> float:
        """Seconds to answer requests that come one after another, by the scheduler."""
        scheduler, done, left = Scheduler(self.session, prefix_cache=False), threading.Event(), [MIX]

        def receive(event: Event) -> None:
            if isinstance(event, Failed):
                raise SystemExit(f"a request failed: {event.error}")
            if isinstance(event, Generated) and event.token.finish_reason is not None:
                left[0] -= 1
                if not left[0]:
                    done.set()

        params = SamplingParams(max_tokens=MIX_ANSWER, ignore_eos=True, temperature=0)
        for _ in range(MIX):
            scheduler.submit(Request(tuple(self._tokens(MIX_PROMPT)), params), receive)
        start = time.perf_counter()
        scheduler.start()
        done.wait()
        seconds = time.perf_counter() - start
        scheduler.stop()
        return seconds


def one_round(whole: Bench, staged: Bench, prompt: int, batches: Sequence[int], found: Seconds) -> None:
    def on_core(name: str, work: Callable[[], float]) -> None:
        with one_core(1):
            found[name].append(work())

    def in_stages(name: str, work: Callable[[], float]) -> None:
        found[f"staged {name}"].append(work())

    on_core(f"prompt {prompt}", lambda: whole.prompt(prompt))
    in_stages(f"prompt {prompt}", lambda: staged.prompt(prompt))
    on_core(f"again prompt {prompt}", lambda: whole.prompt(prompt))
    for batch in batches:
        for size in dict.fromkeys((batch, batch // 2)):
            on_core(f"decode {size} of {batch}", lambda size=size: whole.decode(size, 1))
        for groups in (1, 2):
            in_stages(
                f"decode {batch} in {groups}", lambda batch=batch, groups=groups: staged.decode(batch, groups)
            )
        on_core(f"again decode {batch} of {batch}", lambda batch=batch: whole.decode(batch, 1))
    on_core("mix", whole.mix)
    in_stages("mix", staged.mix)
    on_core("again mix", whole.mix)


def ratio(found: Seconds, over: str, under: str) -> dict[str, float]:
    """The ratio of the medians and of the shortest times, with the least and the most of any round. Other work on the
    machine disturbs two processes more than one, and the shortest times least."""
    each = [a / b for a, b in zip(found[over], found[under], strict=True)]
    return {
        "median": round(statistics.median(found[over]) / statistics.median(found[under]), 3),
        "of the shortest": round(min(found[over]) / min(found[under]), 3),
        "min": round(min(each), 3),
        "max": round(max(each), 3),
    }


def ratios(found: Seconds, prompt: int, batches: Sequence[int]) -> dict[str, Any]:
    """Gains of the staged bundle, and the same ratio of the whole bundle to itself."""
    result: dict[str, Any] = {}
    for name in (f"prompt {prompt}", "mix"):
        result[name] = ratio(found, name, f"staged {name}")
        result[f"noise of {name}"] = ratio(found, name, f"again {name}")
    for batch in batches:
        whole = f"decode {batch} of {batch}"
        result[f"decode {batch}"] = {
            "gain in 1 group": ratio(found, whole, f"staged decode {batch} in 1"),
            "gain in 2 groups": ratio(found, whole, f"staged decode {batch} in 2"),
            "ideal": ratio(found, whole, f"decode {batch // 2} of {batch}"),
            "noise": ratio(found, whole, f"again {whole}"),
        }
    return result


@contextmanager
def both(staged: Path, whole: Path) -> Iterator[tuple[Bench, Bench]]:
    """The whole bundle here with one thread, and the staged one on two actors."""
    with (
        Session.open(staged, threads=1, stages_on="ray") as ours,
        Session.open(whole, threads=1) as theirs,
    ):
        for core, pid in enumerate(getattr(ours, "pids", ())):
            os.sched_setaffinity(
                pid, {core}
            )  # the thread that computes; Ray's other threads go where there is room
        theirs.prefill_chunk = ours.prefill_chunk
        yield Bench(theirs), Bench(ours)


def handover(staged: Path, whole: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of one request."""
    found: Seconds = defaultdict(list)
    with both(staged, whole) as (theirs, ours):
        for number in range(rounds + 1):
            one: Seconds = defaultdict(list)
            with one_core(1):
                one["whole"].append(theirs.decode(1, 1))
            one["staged"].append(ours.decode(1, 1))
            with one_core(1):
                one["again"].append(theirs.decode(1, 1))
            if number:
                for name, values in one.items():
                    found[name] += values
        hidden = theirs.session.manifest.model.hidden_size
    medians = {name: round(1e3 * statistics.median(values), 3) for name, values in found.items()}
    added = [1e3 * (a - b) for a, b in zip(found["staged"], found["whole"], strict=True)]
    shortest = 1e3 * (min(found["staged"]) - min(found["whole"]))
    return {
        "hidden": hidden,
        "ms": medians,
        "added ms": round(statistics.median(added), 3),
        "added ms of the shortest": round(shortest, 3),
    }


@click.command()
@click.argument("staged", type=click.Path(exists=True, path_type=Path))
@click.argument("whole", type=click.Path(exists=True, path_type=Path))
@click.option("--wide", type=click.Path(exists=True, path_type=Path), nargs=2, help="For the hand-over.")
@click.option("--prompt", type=int, default=1024, show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=(4, 8), show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    staged: Path,
    whole: Path,
    wide: tuple[Path, Path] | None,
    prompt: int,
    batches: tuple[int, ...],
    rounds: int,
    out: Path | None,
) -> None:
    """Measure STAGED on two Ray actors against WHOLE on one core."""
    found: Seconds = defaultdict(list)
    with both(staged, whole) as (theirs, ours):
        model = theirs.session.manifest.model
        for number in range(rounds + 1):
            one: Seconds = defaultdict(list)
            one_round(theirs, ours, prompt, batches, one)
            if number:  # the first round maps the weights
                for name, values in one.items():
                    found[name] += values
            click.echo(f"round {number}", err=True)
        chunk = ours.session.prefill_chunk
    result = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("onnxruntime", "ray")},
        "model": {"hidden": model.hidden_size, "layers": model.num_layers, "vocabulary": model.vocab_size},
        "chunk": chunk,
        "rounds": rounds,
        "mix": {"requests": MIX, "prompt": MIX_PROMPT, "answer": MIX_ANSWER},
        "ratios": ratios(found, prompt, batches),
        "load average": os.getloadavg(),
        "shortest seconds": {name: round(min(values), 5) for name, values in found.items()},
        "seconds": {name: round(statistics.median(values), 5) for name, values in found.items()},
        "hand-over": wide and handover(*wide, 2 * rounds),
    }
    text = json.dumps(result, indent=2) + "\n"
    click.echo(text)
    if out is not None:
        out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
