"""What concurrency gives: decoded tokens per second of 1 and 8 requests, and what a long prompt costs the others.

    python benchmarks/make_checkpoint.py /data/9b4 --size 9b-4layers
    glm4-deploy export /data/9b4 /data/9b4-int8 --max-seq-len 4096
    python benchmarks/serving_throughput.py /data/9b4-int8 --out benchmarks/results/serving-throughput

The scheduler is driven directly: no HTTP, no tokenizer, no drafts, no reused prefixes. Decoding is timed while
all requests of a load decode, prompts left out. In each round the loads take turns, and the ratio is taken
within the round. Then, while 7 requests decode, one of 2048 tokens arrives: its time to the first token, and
the gaps between the others' tokens meanwhile, with the prompt in chunks of each budget.
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

PROMPT, LONG_PROMPT = 128, 2048
BUDGETS = (128, 256, 512)


class Watched:
    """One request: when it was submitted, and when each of its tokens came."""

    def __init__(self, scheduler: Scheduler, prompt: tuple[int, ...], tokens: int) -> None:
        self.times: list[float] = []
        self.done = threading.Event()
        self.error: Exception | None = None
        self.submitted = time.perf_counter()
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        scheduler.submit(Request(prompt, params, logprobs=False), self._note)

    def _note(self, event: Event) -> None:
        if isinstance(event, Generated):
            self.times.append(time.perf_counter())
            if event.token.finish_reason:
                self.done.set()
        elif isinstance(event, Failed):
            self.error = event.error
            self.done.set()

    def wait(self) -> None:
        self.done.wait()
        if self.error is not None:
            raise SystemExit(f"a request failed: {self.error}")


def prompts(session: Session, count: int, length: int, seed: int) -> list[tuple[int, ...]]:
    ids = np.random.default_rng(seed).integers(0, session.manifest.model.vocab_size, (count, length))
    return [tuple(row) for row in ids.tolist()]


def decode_rate(session: Session, concurrent: int, tokens: int, seed: int) -> float:
    """Tokens per second of all requests together, from the last one's first token to the first one's last."""
    scheduler = Scheduler(session, prefix_cache=False, speculation=False)
    watched = [Watched(scheduler, prompt, tokens) for prompt in prompts(session, concurrent, PROMPT, seed)]
    scheduler.start()
    for one in watched:
        one.wait()
    scheduler.stop()
    start, end = max(one.times[0] for one in watched), min(one.times[-1] for one in watched)
    count = sum(start < t <= end for one in watched for t in one.times)
    return count / (end - start)


def under_load(session: Session, budget: int, others: int, seed: int) -> dict[str, float]:
    """A long prompt among requests that decode: its first token, and the longest gap that it causes them."""
    scheduler = Scheduler(session, step_tokens=budget, prefix_cache=False, speculation=False)
    scheduler.start()
    decoding = [Watched(scheduler, prompt, 400) for prompt in prompts(session, others, PROMPT, seed)]
    while not all(len(one.times) >= 8 for one in decoding):
        time.sleep(0.01)
    before = [b - a for one in decoding for a, b in zip(one.times[-5:-1], one.times[-4:], strict=True)]
    late = Watched(scheduler, prompts(session, 1, LONG_PROMPT, seed + 1)[0], 2)
    late.wait()
    first = late.times[0] - late.submitted
    gaps = [
        b - a
        for one in decoding
        for a, b in zip(one.times, one.times[1:], strict=False)
        if late.submitted <= b <= late.times[0]
    ]
    scheduler.stop(drain=0)
    return {
        "budget": budget,
        "first_token_s": round(first, 3),
        "gap_before_ms": round(1000 * statistics.median(before), 1),
        "gap_median_ms": round(1000 * statistics.median(gaps), 1),
        "gap_max_ms": round(1000 * max(gaps), 1),
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rounds", default=5, show_default=True)
@click.option("--tokens", default=48, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json and OUT.md.")
def main(bundle: Path, rounds: int, tokens: int, out: Path | None) -> None:
    with Session.open(bundle, max_batch_size=8) as session:
        decode_rate(session, 8, 8, 0)  # kernels packed, caches touched
        rates: list[dict[int, float]] = []
        for number in range(rounds):
            rates.append({count: decode_rate(session, count, tokens, number) for count in (1, 8)})
            click.echo(f"round {number}: {rates[-1]}", err=True)
        loads = [under_load(session, budget, 7, 100 + budget) for budget in BUDGETS]
    ratios = [rate[8] / rate[1] for rate in rates]
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load": os.getloadavg()[0],
        "onnxruntime": version("onnxruntime"),
        "bundle": bundle.name,
        "tokens_per_second": {str(n): round(statistics.median(r[n] for r in rates), 1) for n in (1, 8)},
        "ratio": {"median": round(statistics.median(ratios), 2), "all": [round(r, 2) for r in ratios]},
        "long_prompt_among_7": loads,
    }
    text = json.dumps(result, indent=2)
    click.echo(text)
    if out is not None:
        out.with_suffix(".json").write_text(text + "\n")
        out.with_suffix(".md").write_text(page(result))


def page(result: dict[str, Any]) -> str:
    rate, ratio = result["tokens_per_second"], result["ratio"]
    lines = [
        f"# Serving {result['bundle']}",
        "",
        f"{result['date']}, {result['machine']}, load {result['load']:.1f}, ONNX Runtime {result['onnxruntime']}. Command:",
        "`python benchmarks/serving_throughput.py BUNDLE`",
        "",
        f"Decoding: {rate['1']} tokens/s for one request, {rate['8']} for eight together: "
        f"{ratio['median']} times, the median of the rounds' ratios ({', '.join(map(str, ratio['all']))}).",
        "",
        f"A prompt of {LONG_PROMPT} tokens that arrives while 7 requests decode:",
        "",
        "| tokens per step | its first token, s | others' gap before, ms | meanwhile, median | longest |",
        "|---|---|---|---|---|",
    ]
    columns = ("budget", "first_token_s", "gap_before_ms", "gap_median_ms", "gap_max_ms")
    lines += [
        f"| {' | '.join(str(load[name]) for name in columns)} |" for load in result["long_prompt_among_7"]
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
