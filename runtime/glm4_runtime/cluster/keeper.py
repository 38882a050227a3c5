"""Keeps a number of replicas alive in a fleet, and changes this number."""

import logging
import threading
import time
from collections.abc import Callable

from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.lane import Replica
from glm4_runtime.cluster.watch import watch
from glm4_runtime.errors import Glm4Error, ReplicaError, StoppedError

logger = logging.getLogger(__name__)

# Seconds before a lost replica is started again. Doubled after each short life, up to the most: replicas that others
# kill have short lives, too, so a longer pause could leave none alive.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
# A replica that lived for fewer seconds had a short life.
_SHORT_LIFE = 30.0


class _Kept:
    """One replica that is kept alive; it has a thread.

    Attributes:
        begun: set after the first start. ``error``: why the first start failed.
        end: set when the replica is not to be replaced any more.
    """

    def __init__(self) -> None:
        self.begun, self.end = threading.Event(), threading.Event()
        self.error: Glm4Error | None = None


class Keeper:
    """Starts replicas, watches them, and replaces those that are lost. Has one thread for each."""

    def __init__(self, fleet: Fleet, make: Callable[[str], Replica], step_timeout: float) -> None:
        """``make``: starts the replica of a name; returns when it is ready."""
        self._fleet, self._make, self._step_timeout = fleet, make, step_timeout
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of replicas that are kept alive."""
        return len(self._kept)

    def start(self, count: int) -> None:
        """Start replicas, and wait for them. Raises the error of the first that cannot start, and ends all."""
        started = [self._begin() for _ in range(count)]
        while not all(one.begun.is_set() for one in started) and not any(one.error for one in started):
            time.sleep(0.01)
        for one in started:
            if one.error is not None:
                self.stop()
                raise one.error

    def add(self, insist: bool = False) -> None:
        """Start one more replica, and wait for its first start.

        Args:
            insist: try again after a start that fails, instead of raising its error.
        """
        one = self._begin()
        one.begun.wait()
        if one.error is not None and not insist:
            one.end.set()
            with self._lock:
                self._kept = {name: other for name, other in self._kept.items() if other is not one}
            raise one.error

    def remove(self) -> None:
        """End the newest replica after its requests have ended. Blocks until then."""
        self._retire(*self._newest())

    def resize(self, count: int) -> None:
        """Begin to start or to end as many replicas as needed. Returns at once."""
        while len(self) < count:
            self._begin()
        while len(self) > count:
            threading.Thread(target=self._retire, args=self._newest(), name="retire", daemon=True).start()

    def _newest(self) -> tuple[str, _Kept]:
        with self._lock:
            return self._kept.popitem()

    def _retire(self, name: str, one: _Kept) -> None:
        one.end.set()
        self._fleet.retire(name)

    def stop(self) -> None:
        """Replace no replica from now on."""
        for one in list(self._kept.values()):
            one.end.set()

    def _begin(self) -> _Kept:
        one = _Kept()
        with self._lock:
            taken = {*self._kept, *self._fleet.stats_by_replica()}
            name = next(name for name in map(str, range(len(taken) + 1)) if name not in taken)
            self._kept[name] = one
        threading.Thread(target=self._keep, args=(name, one), name=f"replica-{name}", daemon=True).start()
        return one

    def _keep(self, name: str, one: _Kept) -> None:
        pause = _FIRST_PAUSE
        while not one.end.is_set() and not self._fleet.closed:
            began, first = time.monotonic(), not one.begun.is_set()
            self._live(name, one)
            short = time.monotonic() - began < _SHORT_LIFE
            pause = min(2 * pause, _LONGEST_PAUSE) if short and not first else _FIRST_PAUSE
            one.end.wait(pause)

    def _live(self, name: str, one: _Kept) -> None:
        """One life of a replica."""
        error: Glm4Error | None = None
        replica: Replica | None = None
        try:
            replica = self._make(name)
            self._fleet.join(replica)
        except StoppedError:
            one.end.set()
        except Exception as failure:  # whatever Ray raises must not end the replacement of replicas
            error = failure if isinstance(failure, Glm4Error) else _unexpected(name, failure)
        if error is not None and not one.end.is_set():
            logger.error("replica %s did not start: %s", name, error)
        if not one.begun.is_set():
            one.error = error
            one.begun.set()
        if replica is not None and (error is not None or one.end.is_set()):
            replica.close()
        elif replica is not None:
            watch(self._fleet, replica, self._step_timeout)


def _unexpected(name: str, failure: Exception) -> ReplicaError:
    lines = str(failure).splitlines() or [""]
    return ReplicaError(f"replica {name} could not start ({type(failure).__name__}: {lines[0][:200]})")
