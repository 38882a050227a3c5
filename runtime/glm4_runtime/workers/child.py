"""The loop of a worker process: read a task, run the task within its limits, write the answer.

The operating system enforces the limits, because a task may never return to Python: SIGPROF after the processor time,
and a limited address space. The parent process enforces the deadline.
"""

import contextlib
import json
import mmap
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm4_runtime.workers import frames

if sys.platform != "win32":
    import resource

TaskFunction = Callable[[Any], Any]

# A worker ends after a task if its memory has grown by more than this.
_KEPT = 32 * 2**20


def answer_tasks(handle: TaskFunction, limits_json: str) -> None:
    """Answer tasks until the parent process closes the pipe.

    ``handle`` takes a task and returns its answer. Any exception ends the worker.
    """
    limits = json.loads(limits_json)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with Path(os.devnull).open(
        "r+b"
    ) as nothing:  # a task's own input and output must not mix with the frames
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    _expect_to_end()
    begun = address_space()
    frames.write(answers, frames.encode("ready"))
    with contextlib.suppress(EOFError):
        while True:
            answer = _answer(handle, frames.read(requests), limits)
            spent = b"true" if address_space() > begun + _KEPT else b"false"
            frames.write(answers, b'{"spent": %b, %b}' % (spent, answer))


def _answer(handle: TaskFunction, task: Any, limits: dict[str, Any]) -> bytes:
    """The key and value of the answer's frame for the task's result."""
    _limit(limits["seconds"], limits["memory"])
    try:
        data = frames.encode(handle(task))
    except MemoryError:
        return b'"ended": "memory"'
    finally:
        _limit(0, None)
    return b'"value": ' + data if len(data) <= limits["answer"] else b'"ended": "answer"'


def address_space() -> int:
    """Bytes that this process has mapped; 0 if unknown."""
    return _pages(0)


def resident() -> int:
    """Bytes that this process has in memory; 0 if unknown."""
    return _pages(1)


def _pages(column: int) -> int:
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[column]) * mmap.PAGESIZE
    except OSError:
        return 0


def _limit(seconds: float, memory: int | None) -> None:
    """Limit the following code to ``seconds`` of processor time (0: no limit) and ``memory`` more bytes (None: no
    limit)."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)
        most = resource.RLIM_INFINITY if memory is None else address_space() + memory
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard != resource.RLIM_INFINITY:
            most = hard if most == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _expect_to_end() -> None:
    """No core files, no Ctrl-C. If the machine runs out of memory, the system ends this process first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
