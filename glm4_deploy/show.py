"""Output in a terminal: progress on stderr, results on stdout."""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from glm4_deploy import interrupts, streams
from glm4_runtime.errors import RequestError
from glm4_runtime.progress import Progress

QUIET_SECONDS = 10.0


def require_writable(path: Path | None) -> None:
    """Check before long work: raises :class:`RequestError` if :func:`writing` would."""
    if path is None:
        return
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder; name another file than {path}")
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}; name another file") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Make the folders for a file that the block writes. Raises :class:`RequestError` if the system refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """Progress bars on a terminal; otherwise a plain line per stage and every ten seconds."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _lines()


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        stages: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            interrupts.check()
            if stage not in stages:
                for earlier in stages.values():
                    task = bars.tasks[earlier]
                    bars.update(earlier, total=task.total or 1, completed=task.total or 1)
                stages[stage] = bars.add_task(stage)
            bars.update(stages[stage], completed=done, total=total or None)

        yield report
        for task in bars.tasks:
            bars.update(task.id, total=task.total or 1, completed=task.total or 1)


def _lines() -> Progress:
    shown, at, start = "", 0.0, 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal shown, at, start
        interrupts.check()
        now = time.monotonic()
        start = now if stage != shown else start
        if stage != shown or now - at > QUIET_SECONDS:
            share = f" {100 * done // total} %" if total and done else ""
            if share and done < total and now - start > QUIET_SECONDS:
                share += f", about {duration((now - start) * (total - done) / done)} left"
            with contextlib.suppress(BrokenPipeError):  # the work continues without a reader
                print(f"{stage}{share}", file=sys.stderr, flush=True)
            shown, at = stage, now

    return report


def duration(seconds: float) -> str:
    """A time in a readable unit."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}" if unit == "min" else f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def readable_size(count: float) -> str:
    """Bytes in a readable unit, powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def print_warnings(warnings: Iterable[str]) -> None:
    """Print warnings on stderr, one line each."""
    for warning in warnings:
        print(f"glm4-deploy: warning: {warning}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print JSON; with escapes if the output is not UTF-8."""
    print(json.dumps(value, indent=2, ensure_ascii=not streams.is_utf8()))


def print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a titled list of names and values, one line each, aligned."""
    width = max((len(name) for name, _ in rows), default=0)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
