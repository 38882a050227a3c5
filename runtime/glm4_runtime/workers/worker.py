"""One worker process: its limits, its tasks, and the messages when a task reaches a limit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import glm4_runtime
from glm4_runtime.errors import BundleError, Glm4Error
from glm4_runtime.workers import frames

_BOOT = (
    "import sys; from importlib import import_module; "
    "sys.path[:] = sys.argv[3:]; import_module(sys.argv[1]).main(sys.argv[2])"
)
# The environment variables of a worker: those that Python needs to start, and the time zone. No keys.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "TZ", "LANG")
# glibc reserves 64 MiB of addresses per thread, which would count as memory.
_ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}

# After this many seconds a task continues at a low priority, and its worker ends with it.
_QUICK = 0.05
_LOW_PRIORITY = 10
# Maximum seconds for the start of a worker, also on a busy machine.
_LONGEST_START = 60.0


@dataclass(frozen=True)
class TaskLimits:
    """The limits of one task.

    Attributes:
        seconds: processor time. Windows has no such limit.
        deadline: seconds by the clock.
        memory: bytes that the task may allocate. Linux only.
        answer: bytes of the answer.
    """

    seconds: float
    deadline: float
    memory: int
    answer: int


class WorkerError(Glm4Error):
    """A task reached a limit or ended its worker. The message is a clause that begins with "it".

    Attributes:
        overtime: whether the limit was one of time.
    """

    def __init__(self, message: str, overtime: bool = False) -> None:
        super().__init__(message)
        self.overtime = overtime


class Worker:
    """One process; one thread at a time may use it."""

    def __init__(self, module: str, limits: TaskLimits) -> None:
        self._limits = limits
        self._ready = self._asked = self._slowed = self._grown = self._overdue = False
        package = Path(glm4_runtime.__file__).parents[1]
        paths = [str(package), *(path for path in sys.path if path)]
        # isolated: no hooks of site packages, no PYTHON variables, only the given paths
        command = [sys.executable, "-I", "-S", "-c", _BOOT, module, json.dumps(asdict(limits)), *paths]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | _ONE_ARENA,
            **_APART,
        )
        self._finalizer = weakref.finalize(self, _end, self._process, os.getpid())

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def spent(self) -> bool:
        """Whether it must not get another task: the last one failed, was interrupted, or left the worker in a bad
        state."""
        return self._asked or self._slowed or self._grown

    def ask(self, data: bytes) -> Any:
        self._asked = True
        self._require_ready()
        done = threading.Event()
        threading.Thread(target=self._watch, args=(done,), name="glm4-watch", daemon=True).start()
        try:
            answer = self._exchange(data)
        finally:
            done.set()
        if answer is None:
            raise self._death()
        if "ended" in answer:
            raise WorkerError(_reached(answer["ended"], self._limits))
        self._asked, self._grown = False, answer["spent"]
        return answer["value"]

    def end(self) -> None:
        self._finalizer()

    def _require_ready(self) -> None:
        """Wait for the first frame, which the process sends once it has started."""
        if self._ready:
            return
        timer = threading.Timer(_LONGEST_START, self._process.kill)
        timer.start()
        try:
            self._ready = self._next_answer() is not None
        finally:
            timer.cancel()
        if not self._ready:
            raise BundleError(
                "a worker process ended before it was ready; see that Python can start processes"
            )

    def _exchange(self, data: bytes) -> Any:
        """The answer's frame; None if the worker ended."""
        requests = self._process.stdin
        assert requests is not None
        try:
            frames.write(requests, data)
        except OSError:
            return None
        return self._next_answer()

    def _next_answer(self) -> Any:
        answers = self._process.stdout
        assert answers is not None
        try:
            return frames.read(answers)
        except (OSError, EOFError):
            return None

    def _watch(self, done: threading.Event) -> None:
        """Lower the priority of a long task, and end an overdue one."""
        if done.wait(_QUICK):
            return
        self._slowed = True
        if sys.platform != "win32" and self.alive:
            with contextlib.suppress(OSError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, self._process.pid, _LOW_PRIORITY)
        if not done.wait(self._limits.deadline - _QUICK):
            self._overdue = True
            self._process.kill()

    def _death(self) -> WorkerError:
        code = self._process.wait()
        limit = "deadline" if self._overdue else _DEATHS.get(code, "unknown")
        return WorkerError(_reached(limit, self._limits), overtime=limit in ("deadline", "seconds"))


# Exit codes of processes that the system ended because of a limit.
_DEATHS = {0xC00000FD: "stack"}
if sys.platform != "win32":
    _DEATHS |= {
        -signal.SIGPROF: "seconds",
        -signal.SIGABRT: "memory",
        -signal.SIGSEGV: "stack",
        -signal.SIGBUS: "stack",
    }


def _reached(limit: str, limits: TaskLimits) -> str:
    return {
        "deadline": f"it takes more than {limits.deadline:g} s",
        "seconds": f"it takes more than {limits.seconds:g} s of processor time",
        "memory": f"it needs more than {limits.memory >> 20} MiB of memory",
        "stack": "it ended the process that tried it; it may be nested too deeply",
        "unknown": "it ended the process that tried it",
        "answer": f"it makes more than {limits.answer >> 20} MiB of text",
    }[limit]


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    """End a worker, but only in the process that started it, not in a fork."""
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # data that was not written yet
                stream.close()


# Ctrl-C in a terminal reaches the command, but not its workers.
_APART: dict[str, Any] = (
    {"creationflags": 0x200} if sys.platform == "win32" else {"process_group": 0}  # CREATE_NEW_PROCESS_GROUP
)
