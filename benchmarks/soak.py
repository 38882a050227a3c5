"""The scheduler at full load with random aborts: what leaks, and whether the answers are those of single runs.

    python benchmarks/soak.py BUNDLE --seconds 600 --out benchmarks/results/soak

Twice as many requests as there are slots are always under way: prompts that share beginnings, greedy and
sampled, short and long, a quarter of them given up at a random token or within their prompt. Afterwards all
slots must be free, and threads and open files as before; memory is read every tenth of the time. Of the
greedy answers, ``--check`` of them, those that shared steps with others are held against single runs: the
same tokens, or a first difference where the single run's two best logits lie within 1e-4.
"""

import json
import os
import platform
import queue
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

from glm4_runtime import SamplingParams, Session
from glm4_runtime.scheduler import Event, Failed, Generated, Request, Scheduler, Ticket

TIE = 1e-4
ABORTED = 0.25


class Client:
    """One request, which may be given up after so many events."""

    def __init__(self, request: Request, give_up_after: int | None, over: "queue.Queue[Client]") -> None:
        self.request, self.give_up_after, self.over = request, give_up_after, over
        self.ids: list[int] = []
        self.events = 0
        self.failed: str | None = None
        self.ticket: Ticket | None = None

    def __call__(self, event: Event) -> None:
        self.events += 1
        ended = isinstance(event, Failed)
        if isinstance(event, Failed):
            self.failed = str(event.error)
        if isinstance(event, Generated):
            self.ids.append(event.token.id)
            ended = event.token.finish_reason is not None
        if not ended and self.give_up_after is not None and self.events > self.give_up_after:
            assert self.ticket is not None
            self.ticket.cancel()
            ended = True
        if ended:
            self.over.put(self)


def requests(rng: np.random.Generator, vocab: int, longest: int) -> "Any":
    """Without end: a beginning that a few share, a rest of its own."""
    starts = [rng.integers(4, vocab, n) for n in (24, 100, 300)]
    while True:
        start = starts[rng.integers(3)][: rng.integers(301)] if rng.random() < 0.6 else starts[0][:0]
        prompt = np.concatenate((start, rng.integers(4, vocab, int(rng.exponential(60)) + 1)))
        sampled = {"temperature": 0.9, "top_p": 0.95} if rng.random() < 0.3 else {}
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 100)), ignore_eos=rng.random() < 0.5, **sampled
        )
        yield Request(tuple(prompt[: longest - 1].tolist()), params, logprobs=rng.random() < 0.3)


def resources() -> dict[str, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_mib": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "files": len(list(Path("/proc/self/fd").iterdir())),
    }


def load(
    scheduler: Scheduler, session: Session, seconds: float, seed: int, keep: int
) -> tuple[list[Client], list[dict[str, int]], set[str]]:
    """Full load for so long; a random ``keep`` of the greedy requests, the resources, what failed."""
    rng = np.random.default_rng(seed)
    endless = requests(rng, session.manifest.model.vocab_size, session.max_seq_len)
    over: queue.Queue[Client] = queue.Queue()

    def send() -> None:
        give_up = int(rng.integers(0, 40)) if rng.random() < ABORTED else None
        client = Client(next(endless), give_up, over)
        gate = threading.Event()  # the ticket must be known before the first event can use it

        def listen(event: Event) -> None:
            gate.wait()
            client(event)

        client.ticket = scheduler.submit(client.request, listen)
        gate.set()

    for _ in range(2 * session.max_batch_size):
        send()
    began, samples, failures = time.monotonic(), [], set()
    kept: list[Client] = []
    greedy = 0
    while (passed := time.monotonic() - began) < seconds:
        client = over.get(timeout=60)
        send()
        failures |= {client.failed} if client.failed else set()
        if client.ids and not client.request.params.temperature:
            greedy += 1  # a reservoir: memory must not grow with the number of requests
            place = len(kept) if len(kept) < keep else int(rng.integers(greedy))
            if place < keep:
                kept[place : place + 1] = [client]
        if passed >= seconds * len(samples) / 10:
            samples.append({"second": round(passed)} | resources())
    return kept, samples, failures


def compare(session: Session, clients: list[Client]) -> dict[str, int]:
    """Greedy answers against single runs; those given up as far as they came."""
    ties, wrong = 0, 0
    for client in clients:
        prompt = client.request.prompt_ids
        expected = [token.id for token in session.generate(prompt, client.request.params)]
        pairs = zip(client.ids, expected, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is None:
            wrong += client.give_up_after is None and client.ids != expected
            continue
        logits = session.prefill(0, [*prompt, *expected[:first]])[0]
        session.release(0)
        second, best = np.partition(logits, -2)[-2:]
        ties += best - second <= TIE
        wrong += best - second > TIE
    return {"compared": len(clients), "ties": int(ties), "wrong": int(wrong)}


@click.command(help=__doc__.partition("\n")[0])
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--seconds", default=20.0, show_default=True)
@click.option("--check", default=200, show_default=True, help="Answers to hold against single runs.")
@click.option("--threads", type=int, help="Threads within one operator; all cores where absent.")
@click.option("--slots", type=int, help="Fewer slots than the bundle allows.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json.")
def main(
    bundle: Path,
    seconds: float,
    check: int,
    threads: int | None,
    slots: int | None,
    seed: int,
    out: Path | None,
) -> None:
    with Session.open(bundle, threads=threads, max_batch_size=slots) as session:
        before = resources()
        scheduler = Scheduler(session)
        scheduler.start()
        clients, samples, failures = load(scheduler, session, seconds, seed, check)
        scheduler.stop(drain=30)
        stats = scheduler.stats()
        time.sleep(0.5)  # a joined thread leaves /proc a moment later
        after = resources()
        free = len(session.free_slots())
        figures = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "seconds": seconds,
            "slots": stats.slots,
            "free_slots_after": free,
            "before": before,
            "samples": samples,
            "after": after,
            "requests": dict(stats.requests),
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "generated_tokens": stats.generated_tokens,
            "steps": stats.steps,
            "outside_the_model": round(1 - stats.model_seconds / stats.step_seconds, 4),
            "failures": sorted(failures),
        } | compare(session, clients)
    text = json.dumps(figures, indent=2)
    click.echo(text)
    if out is not None:
        out.with_suffix(".json").write_text(text + "\n")
    leaks = free != stats.slots or after["threads"] > before["threads"] or after["files"] > before["files"]
    if leaks or figures["failures"] or figures["wrong"] or figures["ties"] > 0.01 * figures["compared"]:
        raise SystemExit("the soak found what should not be: see the figures above")


if __name__ == "__main__":
    main()
