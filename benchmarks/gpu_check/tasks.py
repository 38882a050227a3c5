"""What is run in which order, until when, and what is kept of it: a task at a time, results after each."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

Results = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One case.

    Attributes:
        part: names the list of the results that its record joins.
        name: tells it apart from the others of its part.
        run: computes the record; None adds nothing.
    """

    part: str
    name: str
    run: Callable[[], Any]


class Deadline:
    """The moment at which no more is begun, and at which what runs is stopped.

    Args:
        minutes: from now.
        clock: seconds that only grow.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + 60 * minutes

    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self._end - self._clock())

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise TimeoutError in the main thread at the deadline; a call into CUDA ends first."""

        def stop(_signal: int, _frame: FrameType | None) -> None:
            raise TimeoutError("stopped at the deadline")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def run_tasks(
    tasks: Sequence[Task],
    results: Results,
    deadline: Deadline,
    keep: Callable[[Results], Any],
    say: Callable[[str], None],
) -> None:
    """Run tasks in order; each one's record, refusal or lack of time is kept before the next begins.

    Args:
        results: ``results[part]`` takes records, ``refused`` what raised, and ``skipped`` what had no time.
        keep: writes the results; a crash later loses nothing.
    """
    for task in tasks:
        if not deadline.left():
            results["skipped"].append(f"{task.part}: {task.name}")
            continue
        begun = time.monotonic()
        try:
            with deadline.enforced():
                record = task.run()
        except Exception as error:  # one case must not take the others' results with it
            lines = str(error).strip().splitlines() or ["it does not say why"]
            results["refused"].append(f"{task.part}: {task.name}: {type(error).__name__}: {lines[0]}")
            say(results["refused"][-1])
        else:
            if record is not None:
                results.setdefault(task.part, []).append(record)
                say(f"{_verdict(record)} {task.part}: {task.name}, {time.monotonic() - begun:.1f} s")
        keep(results)
    keep(results)


def _verdict(record: Any) -> str:
    if not isinstance(record, dict) or "ok" not in record:
        return "done"
    return "ok" if record["ok"] else "WRONG"


def wrong(results: Results) -> list[Any]:
    """Records that say that they are not right."""
    lists = (records for records in results.values() if isinstance(records, list))
    return [r for records in lists for r in records if isinstance(r, dict) and r.get("ok") is False]
