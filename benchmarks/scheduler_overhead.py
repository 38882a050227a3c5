"""What the scheduler itself costs: microseconds per active slot and step, over a model that takes no time.

    python benchmarks/scheduler_overhead.py --out benchmarks/results/scheduler-overhead

The session is a stand-in whose logits are ready; what remains is planning, sampling, text-free tokens and
events. Logits are random, once per run, of the released checkpoints' vocabulary or a small one.
"""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np

from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Request, Scheduler

STEPS = 200
KINDS = {
    "greedy": ({}, False),
    "greedy, logprobs": ({}, True),
    "top_k 40, top_p 0.95": ({"temperature": 0.6, "top_k": 40, "top_p": 0.95, "seed": 1}, False),
    "top_p 0.9": ({"temperature": 1.0, "top_p": 0.9, "seed": 1}, False),
    "repetition penalty": ({"repetition_penalty": 1.1}, False),
}


class Instant:
    """A session that has always run already."""

    tokenizer = None
    max_seq_len = 32768

    def __init__(self, slots: int, vocab: int) -> None:
        self.max_batch_size = slots
        model = SimpleNamespace(vocab_size=vocab, eos_token_ids=())
        self.manifest = SimpleNamespace(task="causal-lm", model=model)
        self.logits = np.random.default_rng(0).normal(0, 3, (slots, vocab)).astype(np.float32)
        self.free = set(range(slots))

    def free_slots(self) -> list[int]:
        return sorted(self.free)

    def release(self, slot: int) -> None:
        self.free.add(slot)

    def prefill(self, slot: int, token_ids: object, logits: str) -> np.ndarray:  # noqa: ARG002  the session's signature
        self.free.discard(slot)
        return self.logits[:1]

    def decode_block(self, tokens: dict[int, int]) -> tuple[list[int], np.ndarray]:
        return list(tokens), self.logits[: len(tokens)]


def microseconds(slots: int, vocab: int, params: dict[str, float], logprobs: bool) -> float:
    scheduler = Scheduler(Instant(slots, vocab), prefix_cache=False, speculation=False)  # type: ignore[arg-type]
    for seed in range(slots):
        request = Request((seed + 1,) * 10, SamplingParams(ignore_eos=True, **params), logprobs)
        scheduler.submit(request, lambda _: None)
    scheduler.step()  # takes the prompts
    before = scheduler.stats()
    for _ in range(STEPS):
        scheduler.step()
    after = scheduler.stats()
    assert after.generated_tokens - before.generated_tokens == STEPS * slots
    spent = after.step_seconds - before.step_seconds - (after.model_seconds - before.model_seconds)
    return 1e6 * spent / STEPS / slots


@click.command(help=__doc__.partition("\n")[0])
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json and OUT.md.")
def main(out: Path | None) -> None:
    rows = [
        {
            "vocab": vocab,
            "sampling": kind,
            **{f"{slots} slots": round(microseconds(slots, vocab, *how), 1) for slots in (1, 8, 16)},
        }
        for vocab in (2048, 151552)
        for kind, how in KINDS.items()
    ]
    lines = [
        "# What the scheduler costs per step",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, load average {os.getloadavg()[0]:.1f}.",
        f"Microseconds per active slot and step, over {STEPS} steps: planning, sampling and events, without the model.",
        "",
        "    python benchmarks/scheduler_overhead.py",
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
