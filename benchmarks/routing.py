"""Compares rules that choose the replica of a request, on conversations that share system prompts.

    python -m benchmarks.routing --out benchmarks/results/routing.json

``prefix`` is our rule. ``round robin`` takes the replicas in turn. ``two choices`` draws two replicas and takes the one
with fewer requests, as the default router of Ray Serve does. Each rule serves the same conversations through the HTTP
server, on new replicas. The rules alternate, and every round has texts of its own.
"""

import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import openai

from glm4_runtime.cluster.described import DescribedBundle
from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.keeper import Keeper
from glm4_runtime.cluster.replica import RayReplica, ReplicaOptions
from glm4_runtime.cluster.router import Router, Standing
from glm4_runtime.cluster.start import connect
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving

_ROOT = Path(__file__).parents[1]
_STEP_TIMEOUT = 60.0
_WORDS = [
    "king",
    "queen",
    "ship",
    "sea",
    "storm",
    "island",
    "gold",
    "letter",
    "night",
    "road",
    "horse",
    "river",
    "castle",
    "song",
    "winter",
    "friend",
]
SYSTEM_WORDS, TURN_WORDS, ANSWER_TOKENS, TURNS = 120, 12, 12, 4
SYSTEMS, CLIENTS = 8, 12


class Blind(Router):
    """A rule that reads no prompt."""

    def choose(
        self,
        prompt_ids: Sequence[int],  # noqa: ARG002  the router's arguments
        standings: Mapping[str, Standing],
        most_waiting: int | None,  # noqa: ARG002
        adapter: str | None = None,  # noqa: ARG002
    ) -> str | None:
        return self.pick(standings) if standings else None

    def pick(self, standings: Mapping[str, Standing]) -> str:
        """One of the names."""
        raise NotImplementedError


class RoundRobin(Blind):
    """The replicas in turn."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = itertools.count()

    def pick(self, standings: Mapping[str, Standing]) -> str:
        return sorted(standings)[next(self._turn) % len(standings)]


class TwoChoices(Blind):
    """The less busy one of two replicas that are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self._chance = random.Random(0)

    def pick(self, standings: Mapping[str, Standing]) -> str:
        drawn = self._chance.sample(sorted(standings), min(2, len(standings)))
        return min(drawn, key=lambda name: standings[name].requests)


RULES: dict[str, Callable[[], Router]] = {
    "prefix": Router,
    "round robin": RoundRobin,
    "two choices": TwoChoices,
}


def text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(_WORDS, k=words))


def converse(url: str, model: str, seed: int) -> list[float]:
    """One conversation of ``TURNS`` turns. Returns the seconds to the first token of each."""
    client, chance, seconds = openai.OpenAI(base_url=f"{url}/v1", api_key="none"), random.Random(seed), []
    system = text(random.Random(seed // 1000 * 1000 + seed % SYSTEMS), SYSTEM_WORDS)
    messages: list[Any] = [{"role": "system", "content": system}]
    for _ in range(TURNS):
        messages.append({"role": "user", "content": text(chance, TURN_WORDS)})
        start, first, answer = time.monotonic(), None, ""
        stream = client.chat.completions.create(
            model=model, messages=messages, max_tokens=ANSWER_TOKENS, temperature=0, stream=True
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.monotonic() - start
                answer += chunk.choices[0].delta.content
        seconds.append(first or time.monotonic() - start)
        messages.append({"role": "assistant", "content": answer})
    return seconds


def served(bundle: Path, rule: str, replicas: int, conversations: int, seed: int) -> dict[str, Any]:
    """Serve the conversations of one round by one rule, on new replicas."""
    fleet, described = Fleet(64, router=RULES[rule]()), DescribedBundle(bundle, {})
    options = ReplicaOptions(str(bundle), described.manifest.model.eos_token_ids, 64, {"threads": 1})
    keeper = Keeper(fleet, lambda name: RayReplica(name, options, _STEP_TIMEOUT + 10, 0), _STEP_TIMEOUT)
    with serving(described, ServerOptions(port=0, log_level="warning"), fleet) as server:
        keeper.start(replicas)
        model = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").models.list().data[0].id
        start = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as clients:
            jobs = [
                clients.submit(converse, server.url, model, 1000 * seed + i) for i in range(conversations)
            ]
            seconds = sorted(itertools.chain.from_iterable(job.result() for job in jobs))
        total = time.monotonic() - start
        time.sleep(1)  # a report of each replica comes at least each 0.5 s
        stats = fleet.stats()
        keeper.stop()
    return {
        "prompt_tokens": stats.prompt_tokens,
        "computed_tokens": stats.prompt_tokens - stats.cached_tokens,
        "first_token_ms": {p: round(1000 * seconds[len(seconds) * p // 100], 1) for p in PERCENTILES},
        "seconds": round(total, 2),
    }


PERCENTILES = (50, 90, 99)


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""

    def median(values: Iterable[float]) -> float:
        return round(statistics.median(values), 3)

    return {
        "computed_share": median(run["computed_tokens"] / run["prompt_tokens"] for run in runs),
        "first_token_ms": {p: median(run["first_token_ms"][p] for run in runs) for p in PERCENTILES},
        "seconds": median(run["seconds"] for run in runs),
    }


@click.command(help=__doc__.partition("\n")[0])
@click.option(
    "--bundle", type=click.Path(exists=True, path_type=Path), help="Default: the demo, exported for cpu."
)
@click.option("--replicas", default=4, show_default=True)
@click.option("--conversations", default=48, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="File of the result.")
def main(bundle: Path | None, replicas: int, conversations: int, rounds: int, out: Path | None) -> None:
    runs: dict[str, list[dict[str, Any]]] = {rule: [] for rule in RULES}
    with tempfile.TemporaryDirectory() as name:
        if bundle is None:
            bundle = Path(name) / "glm4-tiny"
            demo = str(_ROOT / "demo" / "glm4-tiny")
            command = [sys.executable, "-m", "glm4_deploy", "export", demo, str(bundle), "--target", "cpu"]
            subprocess.run([*command, "--max-batch-size", "4"], check=True, cwd=_ROOT)
        connect(None)
        import ray  # after connect, which gives the cluster its secret

        try:
            for seed in range(rounds):
                for rule, found in runs.items():
                    found.append(served(bundle, rule, replicas, conversations, seed))
                    click.echo(f"round {seed + 1}, {rule}: {found[-1]}", err=True)
        finally:
            ray.shutdown()
    figures = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, shared with other work",
        "versions": {each: version(each) for each in ("ray", "numpy", "onnxruntime", "openai")},
        "command": f"python -m benchmarks.routing {' '.join(sys.argv[1:])}".strip(),
        "replicas": replicas,
        "conversations": f"{conversations} of {TURNS} turns, {SYSTEMS} system prompts, {CLIENTS} at a time",
        "medians": {rule: summary(found) for rule, found in runs.items()},
        "rounds": runs,
    }
    written = json.dumps(figures, indent=2)
    click.echo(written)
    if out is not None:
        out.write_text(written + "\n")


if __name__ == "__main__":
    main()
