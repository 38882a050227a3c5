"""Speed of drafts when a known share of the guesses is right: prompt lookup on edited texts, and a draft model.

    python benchmarks/draft_speed.py TARGET --draft DRAFT --full 61,40 --out benchmarks/results/draft-32b-int8

Logits are dictated, so that random weights serve: every step runs in full, and then the row of the token that is to come
is raised. The draft model's row names the right token with the given chance, and another token otherwise. Greedy. Plain and drafted runs alternate; A/A is the ratio of two plain runs of the same round.

"full depth" carries the measured time of all steps from the bundles' layers to those of ``--full``, by parameters: a step
reads all layers and the head once. The widths are those that paid at the measured depth.
"""

import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from glm4_runtime import SamplingParams, Session
from glm4_runtime.scheduler import Failed, Generated, Request, Scheduler

PROMPT, REPLACED = 200, 25


class Dictated:
    """A session whose next token after position n is ``scripts[first token][n]``, with a chance to be wrong."""

    def __init__(self, session: Session, scripts: dict[int, list[int]], chance: float = 1.0) -> None:
        self.session, self.scripts, self.chance = session, scripts, chance
        self.first: dict[int, int] = {}  # by slot
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def close(self) -> None:
        for slot in range(self.session.max_batch_size):
            self.session.release(slot)

    def prefill(self, slot: int, token_ids: Any, logits: Any = "last") -> np.ndarray:
        if self.session.length(slot) == 0:
            self.first[slot] = int(token_ids[0])
        rows = self.session.prefill(slot, token_ids, logits)
        end = self.session.length(slot)
        for row, position in zip(rows, range(end - len(rows), end), strict=True):
            self._raise(slot, row, position)
        return rows

    def decode_block(self, tokens: dict[int, int]) -> tuple[list[int], np.ndarray]:
        began = time.perf_counter()
        slots, rows = self.session.decode_block(tokens)
        self.seconds += time.perf_counter() - began
        for slot, row in zip(slots, rows, strict=True):
            self._raise(slot, row, self.session.length(slot) - 1)
        return slots, rows

    def run_block(self, tokens: dict[int, Any]) -> tuple[list[int], np.ndarray]:
        began = time.perf_counter()
        slots, rows = self.session.run_block(tokens)
        self.seconds += time.perf_counter() - began
        for slot, some in zip(slots, rows, strict=True):
            end = self.session.length(slot)
            for row, position in zip(some, range(end - len(tokens[slot]), end), strict=False):
                self._raise(slot, row, position)
        return slots, rows

    def _raise(self, slot: int, row: np.ndarray, position: int) -> None:
        script = self.scripts[self.first[slot]]
        if position + 1 < len(script):
            token = script[position + 1]
            if np.random.default_rng((position, self.first[slot])).random() >= self.chance:
                token = 9 if token != 9 else 8
            row[token] = row.max() + 1


def run(
    target: Session, draft: Session | None, lookup: bool, scripts: dict[int, list[int]], chance: float
) -> dict:
    """All requests at once; seconds are those of steps that decode, without the prompts."""
    dictated: Any = Dictated(target, scripts)
    drafting: Any = None if draft is None else Dictated(draft, scripts, chance)
    scheduler = Scheduler(dictated, prefix_cache=False, speculation=lookup, draft=drafting)
    found: list[list[int]] = [[] for _ in scripts]
    for ids, script in zip(found, scripts.values(), strict=True):

        def note(event: Any, ids: list[int] = ids) -> None:
            if isinstance(event, Failed):
                raise SystemExit(str(event.error))
            if isinstance(event, Generated):
                ids.append(event.token.id)

        params = SamplingParams(max_tokens=len(script) - PROMPT, ignore_eos=True)
        scheduler.submit(Request(tuple(script[:PROMPT]), params, logprobs=False), note)
    while not all(found):
        scheduler.step()
    before, began = sum(map(len, found)), time.perf_counter()
    target_before, draft_before = dictated.seconds, drafting.seconds if drafting else 0.0
    while scheduler.stats().active:
        scheduler.step()
    seconds = time.perf_counter() - began
    stats = scheduler.stats()
    draft_seconds = drafting.seconds - draft_before if drafting else 0.0
    scheduler.stop()
    if found != [script[PROMPT:] for script in scripts.values()]:
        raise SystemExit("the tokens are not those that were dictated: drafts changed them")
    return {
        "rate": (sum(map(len, found)) - before) / seconds,
        "target_per_token": (dictated.seconds - target_before) / (sum(map(len, found)) - before),
        "draft_per_token": draft_seconds / (sum(map(len, found)) - before),
        "drafted": stats.drafted_tokens,
        "accepted": stats.accepted_tokens,
    }


def scripts_of(batch: int, vocab: int, edited: bool, tokens: int) -> dict[int, list[int]]:
    scripts = {}
    for seed in range(batch):
        rng = np.random.default_rng(seed)
        text, other = rng.integers(10, vocab - 10, (2, PROMPT))
        if edited:
            other = text.copy()
            other[REPLACED // 2 :: REPLACED] = rng.integers(
                10, vocab - 10, len(other[REPLACED // 2 :: REPLACED])
            )
        scripts[int(text[0])] = [*text.tolist(), *other[:tokens].tolist()]
    return scripts


def depth_factor(session: Session, layers: int | None) -> float:
    """Parameters that a step reads with so many layers, over those with the bundle's."""
    model = session.manifest.model
    if layers is None:
        return 1.0
    config = session.manifest.config
    hidden, inner = model.hidden_size, int(config["intermediate_size"])
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layer, head = hidden * (heads + 3 * inner), hidden * model.vocab_size
    return (layers * layer + head) / (model.num_layers * layer + head)


@click.command(help=__doc__.partition("\n")[0])
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--draft", type=click.Path(exists=True, path_type=Path), help="Draft model. Default: prompt lookup alone."
)
@click.option("--full", help="Layers of the whole models: target, draft.")
@click.option(
    "--acceptance", default="0.7", show_default=True, help="Chances that a guess is right, by commas."
)
@click.option("--batch", "batches", default="1,4", show_default=True, help="Numbers of requests.")
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--tokens", type=click.IntRange(2, PROMPT), default=PROMPT, show_default=True, help="Of each answer."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json and OUT.md.")
def main(
    bundle: Path,
    draft: Path | None,
    full: str | None,
    acceptance: str,
    batches: str,
    rounds: int,
    tokens: int,
    out: Path | None,
) -> None:
    rows = []
    target, small = Session.open(bundle), draft and Session.open(draft)
    depths = [int(part) for part in full.split(",")] if full else [None, None]
    factors = depth_factor(target, depths[0]), 1.0 if small is None else depth_factor(small, depths[1])
    for batch in map(int, batches.split(",")):
        scripts = scripts_of(batch, target.manifest.model.vocab_size, small is None, tokens)
        for chance in map(float, acceptance.split(",")) if small else (1.0,):
            run(target, small, small is None, scripts, chance)  # reads the weights from the disk
            plain, again, with_drafts = [], [], []
            for _ in range(rounds):
                plain.append(run(target, None, False, scripts, chance))
                with_drafts.append(run(target, small, small is None, scripts, chance))
                again.append(run(target, None, False, scripts, chance))
            carried = [
                (one["target_per_token"] * factors[0])
                / (two["target_per_token"] * factors[0] + two["draft_per_token"] * factors[1])
                for one, two in zip(plain, with_drafts, strict=True)
            ]
            ratio = statistics.median(b["rate"] / a["rate"] for a, b in zip(plain, with_drafts, strict=True))
            rows.append(
                {
                    "batch": batch,
                    "chance": chance if small else "edited text",
                    "plain tokens/s": round(statistics.median(one["rate"] for one in plain), 2),
                    "with drafts": round(statistics.median(one["rate"] for one in with_drafts), 2),
                    "times": round(ratio, 2),
                    "times, full depth": round(statistics.median(carried), 2) if full else "",
                    "A/A": " ".join(
                        f"{b['rate'] / a['rate']:.2f}" for a, b in zip(plain, again, strict=True)
                    ),
                    "drafted": with_drafts[-1]["drafted"],
                    "accepted": with_drafts[-1]["accepted"],
                }
            )
            click.echo(json.dumps(rows[-1]))
    model = target.manifest.model
    lines = [
        "# Speed of drafts",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, onnxruntime {version('onnxruntime')}, "
        f"load average {os.getloadavg()[0]:.1f}, {rounds} rounds; ratios are medians over the rounds.",
        f"Target: {model.num_layers} layers, hidden {model.hidden_size}, {target.manifest.precision}."
        + (
            f" Draft: {small.manifest.model.num_layers} layers, hidden {small.manifest.model.hidden_size}, "
            f"{small.manifest.precision}. A step is carried to {full} layers by factors {factors[0]:.2f} and {factors[1]:.2f}."
            if small and full
            else ""
        ),
        "",
        f"    python benchmarks/draft_speed.py TARGET{' --draft DRAFT' if small else ''}{f' --full {full}' if full else ''} "
        f"--acceptance {acceptance} --batch {batches} --rounds {rounds} --tokens {tokens}",
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
