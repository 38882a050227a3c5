"""Lines for stderr, written by a thread of its own: a reader that stops reading holds up nobody else."""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable

# Characters that wait for the reader. Lines beyond them are dropped.
_MOST_WAITING = 4 * 2**20


class LogWriter:
    """Usable from any thread. The thread starts with the first line.

    Attributes:
        dropped: lines that were dropped since the start.
    """

    def __init__(self, tell: Callable[[int], str], most: int = _MOST_WAITING) -> None:
        """``tell`` makes the line that says how many lines were dropped before the next one."""
        self.dropped = 0
        self._tell, self._most, self._waiting = tell, most, 0
        self._told = 0  # of the dropped lines, those that a line of the log tells of
        self._lines: deque[str] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def write(self, line: str) -> None:
        """Hand on a line, without its end; returns at once. Drops the line where too much waits already."""
        with self._changed:
            if self._waiting + len(line) > self._most:
                self.dropped += 1
                return
            self._lines.append(line)
            self._waiting += len(line)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="glm4-log", daemon=True)
                self._thread.start()

    def flush(self, seconds: float) -> bool:
        """Wait until all lines are written, for at most so long; whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line = self._lines.popleft()
                missing, self._told = self.dropped - self._told, self.dropped
            if missing:
                _write(self._tell(missing))
            _write(line)
            with self._changed:
                self._waiting -= len(line)
                self._changed.notify_all()


def _write(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed, or the reader has gone
        try:
            target = sys.stderr.fileno()
        except (OSError, ValueError):  # something else stands in for a file
            print(line, file=sys.stderr, flush=True)
            return
        # Past Python's buffer, whose lock would be waited for at the end of the process.
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(target, data) :]
