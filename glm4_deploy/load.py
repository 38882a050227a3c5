"""Measures a server with OpenAI's API under load.

Closed loop: a number of clients, each of which sends its next request after the answer. Open loop: requests arrive by
a Poisson process at a given rate and do not wait for answers.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from glm4_runtime.errors import RequestError
from glm4_runtime.install import install_command
from glm4_runtime.progress import Progress

PERCENTILES = (50, 90, 95, 99)
# Words that are one token in most vocabularies. Their meaning does not affect the time.
_WORDS = (
    "the", "of", "and", "in", "to", "that", "was", "for", "with", "his", "one", "from", "had", "which", "not", "are",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """
    Attributes:
        clients: number of clients of a closed loop. ``rate``: requests per second of an open loop. Exactly one of
            both is given.
        requests: number of measured requests, after ``warmup`` others.
        prompt_words: length of each random prompt; all begin with the same ``shared_words`` words.
        max_tokens: tokens of each answer; exact with ``ignore_eos``, which other servers may not support.
    """

    clients: int | None = None
    rate: float | None = None
    requests: int = 32
    warmup: int = 2
    prompt_words: int = 128
    shared_words: int = 0
    max_tokens: int = 64
    ignore_eos: bool = True
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.clients is None) == (self.rate is None):
            raise RequestError("a load has either clients (closed loop) or a rate (open loop)")
        if self.shared_words >= self.prompt_words:
            raise RequestError(
                f"shared_words is {self.shared_words}, but must be below prompt_words, {self.prompt_words}"
            )


@dataclass
class Sample:
    """One request: the times of sending and of each piece of text, in seconds."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    error: str | None = None


def measure_load(
    url: str, loads: Sequence[Load], api_key: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Run each load in turn. Raises :class:`RequestError` if the server cannot be reached."""
    return asyncio.run(_measure(url.rstrip("/"), loads, api_key, progress or (lambda *_: None)))


async def _measure(
    url: str, loads: Sequence[Load], api_key: str | None, progress: Progress
) -> dict[str, Any]:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits) as client:
        model = await _model(client)
        runs = [await _run(client, model, load, progress) for load in loads]
    return {"url": url, "model": model, "runs": runs}


async def _model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise RequestError(
            f"{client.base_url} does not list its models as OpenAI's API does: {error}"
        ) from error


async def _run(client: httpx.AsyncClient, model: str, load: Load, progress: Progress) -> dict[str, Any]:
    prompts = list(_prompts(load))
    for prompt in prompts[: load.warmup]:
        await _ask(client, model, prompt, load)
    measured = prompts[load.warmup :]
    title = f"{load.clients} clients" if load.rate is None else f"{load.rate:g} requests/s"
    done = 0

    async def ask(prompt: str) -> Sample:
        nonlocal done
        sample = await _ask(client, model, prompt, load)
        done += 1
        progress(title, done, len(measured))
        return sample

    start = time.perf_counter()
    samples = await (_closed(measured, load.clients, ask) if load.clients else _open(measured, load, ask))
    return summary(load, samples, time.perf_counter() - start)


def _prompts(load: Load) -> Iterator[str]:
    chance = random.Random(load.seed)
    shared = chance.choices(_WORDS, k=load.shared_words)
    for _ in range(load.warmup + load.requests):
        own = chance.choices(_WORDS, k=load.prompt_words - load.shared_words)
        yield " ".join(shared + own)


async def _closed(prompts: Sequence[str], clients: int, ask: Callable[[str], Any]) -> list[Sample]:
    waiting = iter(prompts)

    async def client() -> list[Sample]:
        return [await ask(prompt) for prompt in waiting]

    answered = await asyncio.gather(*(client() for _ in range(clients)))
    return [sample for samples in answered for sample in samples]


async def _open(prompts: Sequence[str], load: Load, ask: Callable[[str], Any]) -> list[Sample]:
    assert load.rate is not None
    chance = random.Random(load.seed + 1)
    tasks = []
    for prompt in prompts:
        tasks.append(asyncio.create_task(ask(prompt)))
        await asyncio.sleep(chance.expovariate(load.rate))
    return list(await asyncio.gather(*tasks))


async def _ask(client: httpx.AsyncClient, model: str, prompt: str, load: Load) -> Sample:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | ({"ignore_eos": True} if load.ignore_eos else {})
    sample = Sample(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body, timeout=load.timeout) as response:
            if response.status_code != 200:
                sample.error = (
                    f"{response.status_code}: {(await response.aread())[:200].decode(errors='replace')}"
                )
            else:
                await _read(response.aiter_lines(), sample)
    except httpx.HTTPError as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.end = time.perf_counter()
    return sample


async def _read(lines: AsyncIterator[str], sample: Sample) -> None:
    async for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        try:
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                sample.error = str(data["error"].get("message"))
                return
            has_text = any(choice.get("text") for choice in data["choices"])
        except (ValueError, KeyError, AttributeError, TypeError):
            sample.error = f"the server sent {line[:80]!r}, which is no chunk of a completion"
            return
        if has_text:
            sample.arrivals.append(time.perf_counter())
        if data.get("usage"):
            usage = data["usage"]
            sample.prompt_tokens, sample.tokens = usage["prompt_tokens"], usage["completion_tokens"]
            sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def summary(load: Load, samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """The results of one load.

    ``inter_token_seconds`` is the time between two pieces of text; a fast server may send several at once.
    ``per_token_seconds`` is the mean of each answer: the time after its first token, divided by its further tokens.
    """
    good = [sample for sample in samples if sample.error is None and sample.arrivals]
    errors = [sample.error or "no text came" for sample in samples if sample not in good]
    gaps = [
        later - earlier
        for sample in good
        for earlier, later in zip(sample.arrivals, sample.arrivals[1:], strict=False)
    ]
    tokens = sum(sample.tokens for sample in good)
    return {
        "loop": "closed" if load.rate is None else "open",
        "clients": load.clients,
        "rate": load.rate,
        "requests": len(samples),
        "failed": len(errors),
        "errors": sorted(set(errors))[:5],
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(sample.prompt_tokens for sample in good),
        "cached_tokens": sum(sample.cached_tokens for sample in good),
        "generated_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "requests_per_second": round(len(good) / seconds, 3),
        "first_token_seconds": spread([sample.arrivals[0] - sample.sent for sample in good]),
        "inter_token_seconds": spread(gaps),
        "per_token_seconds": spread(
            [
                (sample.arrivals[-1] - sample.arrivals[0]) / (sample.tokens - 1)
                for sample in good
                if sample.tokens > 1
            ]
        ),
        "request_seconds": spread([sample.end - sample.sent for sample in good]),
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles (nearest rank); None without values."""
    if not values:
        return None
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES}
    figures = {"mean": sum(ordered) / len(ordered)} | ranks | {"max": ordered[-1]}
    return {name: round(value, 6) for name, value in figures.items()}


def plot(report: dict[str, Any], path: Path) -> None:
    """Plot latencies and throughput against the load; the file's suffix decides: .svg, .png or .pdf."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise RequestError(f"a plot needs matplotlib; run {install_command('bench')}") from error
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 4)
    for panel, (key, title) in zip(
        panels,
        (
            ("first_token_seconds", "time to first token, s"),
            ("per_token_seconds", "per further token, s"),
            ("request_seconds", "whole request, s"),
            ("tokens_per_second", "tokens per second"),
        ),
        strict=True,
    ):
        _draw(panel, report["runs"], key, title)
    panels[0].legend(fontsize="small")
    figure.suptitle(str(report["model"]), fontsize="medium")
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise RequestError(f"the plot cannot be written to {path}: {error}") from error


def _draw(panel: Any, runs: Sequence[dict[str, Any]], key: str, title: str) -> None:
    usable = [run for run in runs if run[key] is not None]
    loads = [run["clients"] or run["rate"] for run in usable]
    if key == "tokens_per_second":
        panel.plot(loads, [run[key] for run in usable], marker="o", color="C0")
    else:
        for name in ("p50", "p95", "p99"):
            panel.plot(loads, [run[key][name] for run in usable], marker="o", label=name)
    panel.set_title(title, fontsize="medium")
    panel.set_xlabel("clients" if runs[0]["loop"] == "closed" else "requests per second")
    panel.margins(y=0.15)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
