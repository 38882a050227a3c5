"""Writes log lines to stderr from a separate thread, so that a slow reader of stderr does not block the server."""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable

# Most characters in the queue. Further lines are dropped.
_MOST_WAITING = 4 * 2**20


class LogWriter:
    """A queue of log lines and the thread that writes them. All methods may be called from any thread.

    Attributes:
        dropped: number of lines dropped so far.
    """

    def __init__(self, tell: Callable[[int], str], most: int = _MOST_WAITING) -> None:
        """
        Args:
            tell: makes a log line from the number of lines dropped since the last written line.
            most: limit of the queue, in characters.
        """
        self.dropped = 0
        self._tell, self._most, self._waiting = tell, most, 0
        self._told = 0  # number of dropped lines that the log has reported
        self._lines: deque[str] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def write(self, line: str) -> None:
        """Queue a line without its newline, and return at once. If the queue is full, the line is dropped."""
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
        """Wait at most ``seconds`` until all lines are written; returns whether they are."""
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
    with contextlib.suppress(OSError, ValueError):  # stderr is closed, or its reader has ended
        try:
            target = sys.stderr.fileno()
        except (OSError, ValueError):  # stderr was replaced by an object without a file descriptor
            print(line, file=sys.stderr, flush=True)
            return
        # os.write avoids the lock of Python's buffer: the process would wait for this lock when it exits.
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(target, data) :]
