"""Attack a server, and measure how long a health probe and small requests take meanwhile.

    python -m benchmarks.attacks_serving BUNDLE --out benchmarks/results/attacks-serving.json

Each attack goes on for some seconds against a server of its own. Beside it three clients ask for the server's health,
the tokens of a word, and an answer of four tokens, again and again. An attack has found something if one of these takes longer
than ``LONGEST`` or fails.
"""

import contextlib
import hashlib
import http.client
import json
import os
import platform
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from glm4_runtime.tokenizer import Tokenizer

LONGEST = 0.5
MODEL = "m"
JSON = {"Content-Type": "application/json"}
MEGABYTES = 3_900_000
PROBES: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "health": ("GET", "/health", None),
    "tokenize": ("POST", "/tokenize", {"prompt": "word"}),
    "completion": (
        "POST",
        "/v1/completions",
        {"model": MODEL, "prompt": "word", "max_tokens": 4, "ignore_eos": True},
    ),
}
ENDLESS = (
    "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}"
)


class Target:
    """A server under attack."""

    def __init__(self, bundle: Path, port: int) -> None:
        self.bundle, self.port = bundle, port
        self.over = threading.Event()

    def ask(self, method: str, path: str, body: dict[str, Any] | None, timeout: float = 30) -> int:
        """The status of an answer; 0 where there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), JSON)
            response = connection.getresponse()
            response.read()
            return response.status
        except OSError:
            return 0
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def send(self, path: str, body: bytes, length: int | None = None) -> socket.socket:
        """A connection that has sent a request, whose body may be shorter than it says, and reads nothing."""
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = self.connect()
        connection.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
        return connection

    def repeat(self, count: int, path: str, body: Callable[[int], dict[str, Any]]) -> None:
        """``count`` clients that ask again and again; ``body`` gets the number of the request."""

        def client(number: int) -> None:
            while not self.over.is_set():
                self.ask("POST", path, body(number))
                number += count

        threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def nothing(target: Target) -> None:
    target.over.wait()


def blanks(target: Target) -> None:
    """Answers of blanks while tools are offered: text that may begin a call is held back."""
    tokenizer = Tokenizer.from_folder(target.bundle)
    blank = max(range(tokenizer.vocab_size), key=lambda token: _blanks(tokenizer.decode([token])))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    chat = {
        "model": MODEL, "messages": [{"role": "user", "content": "x"}], "tools": [tool],
        "logit_bias": {str(blank): 100}, "ignore_eos": True, "max_tokens": 1900,
    }  # fmt: skip
    target.repeat(2, "/v1/chat/completions", lambda _: chat)


def _blanks(text: str) -> int:
    return len(text) if text and not text.strip(" ") else 0


def patterns(target: Target) -> None:
    """Schemas whose patterns are intersected, each new."""

    def body(number: int) -> dict[str, Any]:
        parts = [{"pattern": f"a{{{count}}}.*b{number}"} for count in range(12)]
        schema = {"name": "n", "schema": {"type": "string", "allOf": parts}}
        form = {"type": "json_schema", "json_schema": schema}
        return {"model": MODEL, "prompt": "x", "max_tokens": 4, "response_format": form}

    target.repeat(4, "/v1/completions", body)


def unread(target: Target) -> None:
    """Twice as many streams as there are slots, and nobody reads them."""
    asked = {"model": MODEL, "prompt": "x", "stream": True, "ignore_eos": True, "logprobs": 20}
    body = json.dumps(asked | {"max_tokens": 1500}).encode()
    with _closed([target.send("/v1/completions", body) for _ in range(8)]):
        target.over.wait()


def bodies(target: Target) -> None:
    """Bodies of 4 MB that never end."""
    length = 4 * 2**20
    made = []
    for _ in range(60):
        with contextlib.suppress(OSError):
            connection = target.send("/tokenize", b"", length)
            connection.settimeout(0.1)
            made.append(connection)
            connection.sendall(b" " * (length - 1))
    with _closed(made):
        target.over.wait()


def silent(target: Target) -> None:
    """More connections than the server takes: half say nothing, half send half a header."""
    made = []
    for number in range(1200):
        with contextlib.suppress(OSError):
            made.append(target.connect())
            if number % 2:
                made[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ")
    with _closed(made):
        target.over.wait()


def prompts(target: Target) -> None:
    """Prompts as long as a body may be."""
    target.repeat(
        8, "/v1/completions", lambda number: {"model": MODEL, "prompt": "a1 \n春"[number % 4] * MEGABYTES}
    )


def templates(target: Target) -> None:
    """Conversations for which the chat template loops for ever."""
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "loop"}], "max_tokens": 2}
    target.repeat(20, "/v1/chat/completions", lambda _: chat)


ATTACKS = {
    attack.__name__: attack
    for attack in (nothing, blanks, patterns, unread, bodies, silent, prompts, templates)
}


@contextlib.contextmanager
def _closed(connections: list[socket.socket]) -> Iterator[None]:
    try:
        yield
    finally:
        for connection in connections:
            connection.close()


@contextlib.contextmanager
def serving(bundle: Path, log: Path) -> Iterator[int]:
    """The port of a server of its own."""
    command = [
        sys.executable,
        "-m",
        "glm4_deploy",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--served-name",
        MODEL,
    ]
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            while not (found := re.search(r'"url": "http://[^"]*:(\d+)"', log.read_text())):
                if process.poll() is not None:
                    raise click.ClickException(f"the server did not start: {log.read_text()[-300:]}")
                time.sleep(0.05)
            yield int(found[1])
            if process.poll() is not None:
                raise click.ClickException(f"the server ended with {process.returncode}")
        finally:
            process.terminate()


def probed(target: Target, seconds: float) -> dict[str, dict[str, Any]]:
    """The worst and the median time of each probe, in seconds, and how many failed."""
    end = time.monotonic() + seconds
    found: dict[str, dict[str, Any]] = {}

    def probe(name: str) -> None:
        times, failed = [], 0
        while time.monotonic() < end:
            began = time.monotonic()
            failed += target.ask(*PROBES[name]) != 200
            times.append(time.monotonic() - began)
            time.sleep(0.02)
        found[name] = {
            "worst": round(max(times), 3),
            "median": round(statistics.median(times), 4),
            "asked": len(times),
            "failed": failed,
        }

    threads = [threading.Thread(target=probe, args=(name,)) for name in PROBES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: found[name] for name in PROBES}


def attacked(bundle: Path, name: str, seconds: float) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        if name == "templates":
            bundle = _with_endless_template(bundle, Path(folder) / "bundle")
        with serving(bundle, Path(folder) / "log") as port:
            target = Target(bundle, port)
            for request in PROBES.values():
                target.ask(*request)
            attacker = threading.Thread(target=ATTACKS[name], args=(target,))
            attacker.start()
            try:
                return probed(target, seconds)
            finally:
                target.over.set()
                attacker.join()


def _with_endless_template(bundle: Path, copy: Path) -> Path:
    shutil.copytree(bundle, copy)
    template, manifest = copy / "chat_template.jinja", copy / "manifest.json"
    template.write_text(ENDLESS + template.read_text("utf-8"), "utf-8")
    data = template.read_bytes()
    told = json.loads(manifest.read_text("utf-8"))
    told["files"][template.name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest.write_text(json.dumps(told), "utf-8")
    return copy


def findings(figures: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    return [
        f"{attack}: {probe} took {found['worst']} s at worst, {found['failed']} failed"
        for attack, probes in figures.items()
        for probe, found in probes.items()
        if found["worst"] > LONGEST or found["failed"]
    ]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--seconds", default=8.0, show_default=True, help="Of each attack.")
@click.option("--attack", "names", multiple=True, type=click.Choice(list(ATTACKS)), help="All by default.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the figures in this JSON file.")
def main(bundle: Path, seconds: float, names: tuple[str, ...], out: Path | None) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    load = os.getloadavg()[0]
    figures = {name: attacked(bundle, name, seconds) for name in names or ATTACKS}
    told = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {load:.1f} before",
        "versions": {name: version(name) for name in ("onnxruntime", "uvicorn", "starlette", "llguidance")},
        "command": f"python -m benchmarks.attacks_serving BUNDLE --seconds {seconds:g}",
        "attacks": figures,
        "findings": findings(figures),
    }
    text = json.dumps(told, indent=2)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")
    sys.exit(bool(told["findings"]))


if __name__ == "__main__":
    main()
