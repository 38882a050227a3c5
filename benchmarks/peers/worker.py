"""One contender in a process and an environment of its own; nothing but the standard library until it is chosen.

    python -m benchmarks.peers.worker MODULE convert CHECKPOINT FOLDER FORMAT
    python -m benchmarks.peers.worker MODULE serve FOLDER FORMAT SETTING THREADS POSITIONS SLOTS

``serve`` answers lines of JSON on stdin with lines on stdout: first how long loading took, then for each
``{"do": "prefill", "tokens": n, "vocabulary": v}``, ``{"do": "fill", "batch": b, ...}`` of the same, and
``{"do": "spread", "batch": b}`` and ``{"do": "decode", "steps": n}`` its seconds, until stdin ends.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Place:
    """What a driver opens.

    Attributes:
        folder: what ``convert`` wrote.
        format: the weights', such as int8.
        setting: of the run, such as f32; "" for the runtime's own choice.
        positions, slots: the longest sequence, and the most that decode together.
    """

    folder: Path
    format: str
    setting: str
    threads: int
    positions: int
    slots: int


class Driver(Protocol):
    """What each module's ``Driver`` does; ``convert`` beside it writes what it opens."""

    def __init__(self, place: Place) -> None: ...

    def prefill(self, ids: list[int]) -> None:
        """Run a prompt from nothing, up to the logits of its last position."""

    def fill(self, ids: list[int], batch: int) -> None:
        """Make ``batch`` sequences that hold this prompt, and forget all others."""

    def spread(self, batch: int) -> None:
        """Make ``batch`` sequences of the first one."""

    def decode(self, steps: int) -> None:
        """Take so many steps with all sequences together, each the likeliest token of the one before."""


def prompt(length: int, vocabulary: int) -> list[int]:
    """Ids that are the same for every contender."""
    draw = random.Random(length)
    return [draw.randrange(vocabulary) for _ in range(length)]


def serve(make: Callable[[Place], Driver], place: Place) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    driver, seconds = timed(lambda: opened(make, place))
    print(json.dumps({"seconds": seconds}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        seconds = timed(work(driver, asked))[1]
        print(json.dumps({"seconds": seconds}), file=replies, flush=True)


def opened(make: Callable[[Place], Driver], place: Place) -> Driver:
    """Loaded is what has answered once: some runtimes pack their weights only then."""
    driver = make(place)
    driver.prefill([0])
    return driver


def work(driver: Driver, asked: dict[str, Any]) -> Callable[[], None]:
    """What is asked for, ready to be timed."""
    if asked["do"] == "decode":
        return lambda: driver.decode(asked["steps"])
    if asked["do"] == "spread":
        return lambda: driver.spread(asked["batch"])
    ids = prompt(asked["tokens"], asked["vocabulary"])
    if asked["do"] == "fill":
        return lambda: driver.fill(ids, asked["batch"])
    return lambda: driver.prefill(ids)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def main(name: str, task: str, *arguments: str) -> None:
    module = import_module(f"benchmarks.peers.{name}")
    if task == "convert":
        checkpoint, folder, form = arguments
        module.convert(Path(checkpoint), Path(folder), form)
        return
    folder, form, setting, *counts = arguments
    serve(module.Driver, Place(Path(folder), form, setting, *map(int, counts)))


if __name__ == "__main__":
    main(*sys.argv[1:])
