"""What the HTTP front costs: requests and tokens per second with a stand-in model that needs no time.

    python -m benchmarks.front_rate --out benchmarks/results/front-rate.json

The stand-in gives each running request one token per step of 20 ms, from a thread of the server's process. Clients run in
a process of their own, and so does the chat template. The server's processor time per request does not depend on the
clients; its inverse is what one core can do.
"""

import asyncio
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import httpx

from glm4_runtime.cluster.described import DescribedBundle
from glm4_runtime.generate import Token
from glm4_runtime.scheduler import Event, Generated, Request, SchedulerStats, Started
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving

_ROOT = Path(__file__).parents[1]
TOKENS = 64
PROMPT = "Tell me of the old king and of the queen who sailed around the world. " * 8
CLIENTS = 32
STEP = 0.02  # seconds between two tokens of a request, as of a model; tokens that come together cost less


class _Handle:
    """A request that is answered at once."""

    held = lagging = False

    def hold(self) -> None: ...

    def go_on(self) -> None: ...

    def lag(self) -> None: ...

    def catch_up(self) -> None: ...

    def cancel(self) -> None: ...


class StandIn:
    """A backend that answers every request with the same tokens, one per step, without a model."""

    ready = True

    def __init__(self) -> None:
        self._new: queue.SimpleQueue[tuple[Request, Callable[[Event], None]]] = queue.SimpleQueue()
        self._stopped = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="stand-in", daemon=True).start()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> _Handle:
        self._new.put((request, on_event))
        return _Handle()

    def stop(self, drain: float | None = None) -> None:
        del drain
        self._stopped.set()

    def load_adapter(self, name: str, folder: str | Path) -> None: ...

    def unload_adapter(self, name: str) -> None: ...

    def stats(self) -> SchedulerStats:
        return SchedulerStats(0, 0, 1, 0, 0, 0, 0, 0, {}, 0, 0.0, 0.0)

    def stats_by_replica(self) -> Mapping[str, SchedulerStats]:
        return {}

    def _run(self) -> None:
        running: list[tuple[Callable[[Event], None], int]] = []
        while not self._stopped.wait(STEP):
            for listen, given in running:
                last = "length" if given == TOKENS - 1 else None
                listen(Generated(Token(300 + given % 20, " word", -0.5, last)))
            running = [(listen, given + 1) for listen, given in running if given + 1 < TOKENS]
            while not self._new.empty():
                request, listen = self._new.get()
                listen(Started(0, len(request.prompt_ids)))
                running.append((listen, 0))


async def _ask(url: str, model: str, streamed: bool, seconds: float) -> int:
    """The number of answers that 32 clients get in so many seconds."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": TOKENS,
        "stream": streamed,
    }
    end, done = time.monotonic() + seconds, 0

    async def client() -> None:
        nonlocal done
        async with httpx.AsyncClient(timeout=60) as http:
            while time.monotonic() < end:
                async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                    answer.raise_for_status()
                    async for _ in answer.aiter_raw():
                        pass
                done += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return done


def _processor_seconds() -> float:
    own = os.times()
    return own.user + own.system


def measured(bundle: Path, streamed: bool, seconds: float) -> dict[str, float]:
    """The front's processor time per request, in one round."""
    with serving(
        DescribedBundle(bundle, {}), ServerOptions(port=0, log_level="warning"), StandIn()
    ) as server:
        model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        command = [sys.executable, "-m", "benchmarks.front_rate", "--ask", server.url, "--model", model]
        command += ["--seconds", str(seconds), *(["--streamed"] if streamed else [])]
        before, start = _processor_seconds(), time.monotonic()
        answers = int(subprocess.run(command, check=True, cwd=_ROOT, capture_output=True, text=True).stdout)
        spent, took = _processor_seconds() - before, time.monotonic() - start
    return {
        "answers": answers,
        "requests_per_second": answers / took,
        "processor_ms_per_request": 1000 * spent / answers,
    }


@click.command(help=__doc__.partition("\n")[0])
@click.option("--seconds", default=10.0, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="File of the result.")
@click.option("--ask", hidden=True)
@click.option("--model", hidden=True, default="")
@click.option("--streamed", is_flag=True, hidden=True)
def main(seconds: float, rounds: int, out: Path | None, ask: str | None, model: str, streamed: bool) -> None:
    if ask is not None:
        click.echo(asyncio.run(_ask(ask, model, streamed, seconds)))
        return
    runs: dict[str, list[dict[str, float]]] = {"whole": [], "streamed": []}
    with tempfile.TemporaryDirectory() as name:
        bundle, demo = Path(name) / "glm4-tiny", str(_ROOT / "demo" / "glm4-tiny")
        command = [sys.executable, "-m", "glm4_deploy", "export", demo, str(bundle), "--no-parity"]
        subprocess.run(command, check=True, cwd=_ROOT)
        for _ in range(rounds):
            for kind, found in runs.items():
                found.append(measured(bundle, kind == "streamed", seconds))
                click.echo(f"{kind}: {found[-1]}", err=True)
    figures: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, shared with other work",
        "versions": {each: version(each) for each in ("uvicorn", "fastapi", "httpx")},
        "command": f"python -m benchmarks.front_rate {' '.join(sys.argv[1:])}".strip(),
        "what": f"chat, a prompt of {len(PROMPT.split())} words, {TOKENS} tokens, {CLIENTS} clients",
    }
    for kind, found in runs.items():
        spent = statistics.median(run["processor_ms_per_request"] for run in found)
        figures[kind] = {
            "processor_ms_per_request": round(spent, 3),
            "requests_per_second_of_one_core": round(1000 / spent, 1),
            "tokens_per_second_of_one_core": round(1000 * TOKENS / spent),
            "rounds": found,
        }
    text = json.dumps(figures, indent=2)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
