"""The backend of a server with replicas: one queue for each replica, and migration of requests from dead replicas."""

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from glm4_runtime.cluster.lane import Lane, Replica
from glm4_runtime.cluster.migration import Migration
from glm4_runtime.cluster.order import Action, Identity, ReplicaReport, order_of, total
from glm4_runtime.cluster.router import Router
from glm4_runtime.errors import (
    BundleError,
    DeadlineError,
    QueueFullError,
    ReplicaError,
    RequestError,
    StoppedError,
)
from glm4_runtime.scheduler import Event, Request, SchedulerStats

logger = logging.getLogger(__name__)

# Seconds for which requests wait for a replica while none is alive.
PATIENCE = 120.0
# Seconds between two looks at the clock, for deadlines and for the end of a drain.
_TICK = 0.05
_FIXED_ADAPTERS = "replicas load and unload no adapters while they run; give all adapters at the start by serve --lora NAME=DIR"


class Fleet:
    """Routes requests to replicas, which join and are lost at any time. Implements ``Backend``.

    ``deliver`` and ``lost`` of one replica must be called by one thread.
    """

    def __init__(self, max_queue: int, before: "Fleet | None" = None, router: Router | None = None) -> None:
        """
        Args:
            max_queue: most requests that wait for one replica.
            before: the fleet that this one replaces. Its statistics count here.
            router: chooses the replica of a request. Default: by the prefix.
        """
        self._max_queue, self._before = max_queue, before
        self._router = router or Router()
        self._lock = threading.RLock()
        self._lanes: dict[str, Lane] = {}
        self._homeless: deque[Migration] = deque()
        self._alone_since: float | None = time.monotonic()  # no replica is alive since then
        self._numbers = itertools.count()
        self._identity: Identity | None = None
        self._retired: list[SchedulerStats] = []  # at most one
        self._closed = False
        self._stopped = threading.Event()
        self.migrations = self.deaths = 0

    # The backend ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Watch the clock on a thread: without replicas, nothing else would end requests that wait. Replicas join later."""
        threading.Thread(target=self._watch_clock, name="fleet-clock", daemon=True).start()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Migration:
        order_of(request)  # raises what a replica could not take
        migration = Migration(request, on_event, self._act)
        with self._lock:
            if self._closed:
                raise StoppedError("the server is stopping and takes no more requests")
            if not self._lanes:
                raise ReplicaError("no replica is ready; try again in a few seconds")
            if not self._place(migration, self._max_queue):
                waiting = sum(len(lane.waiting) for lane in self._lanes.values())
                raise QueueFullError(f"{waiting} requests are waiting already; try again in 1 s", 1.0)
        return migration

    def load_adapter(self, name: str, folder: str | Path) -> None:  # noqa: ARG002  the backend's arguments
        """Replicas load their adapters at the start only. Raises :class:`RequestError`."""
        raise RequestError(_FIXED_ADAPTERS)

    def unload_adapter(self, name: str) -> None:  # noqa: ARG002
        """Raises :class:`RequestError`."""
        raise RequestError(_FIXED_ADAPTERS)

    def stop(self, drain: float | None = None) -> None:
        with self._lock:
            self._closed = True
        end = None if drain is None else time.monotonic() + drain
        while self._open() and (end is None or time.monotonic() < end):
            time.sleep(_TICK)
        for migration in self._open():
            migration.fail(StoppedError("the server stopped before the request was done"))
        with self._lock:
            lanes, self._lanes = list(self._lanes.values()), {}
            for lane in lanes:
                self._gone(lane)
        for lane in lanes:
            lane.replica.close()
        self._stopped.set()

    def stats(self) -> SchedulerStats:
        with self._lock:
            waiting = len(self._homeless) + sum(len(lane.waiting) for lane in self._lanes.values())
            found = total([*self._retired, *self._own_stats().values()])
            before = self._before
        found = replace(found, queued=found.queued + waiting)
        return found if before is None else total([found, before.stats()])

    # Replicas ---------------------------------------------------------------------------------------

    def stats_by_replica(self) -> Mapping[str, SchedulerStats]:
        """The last statistics of each replica that is alive."""
        with self._lock:
            mine, before = self._own_stats(), self._before
        return mine if before is None else {**before.stats_by_replica(), **mine}

    def _own_stats(self) -> dict[str, SchedulerStats]:
        return {name: lane.stats for name, lane in self._lanes.items() if lane.stats is not None}

    @property
    def ready(self) -> bool:
        return bool(self._lanes) and not self._closed

    @property
    def requests(self) -> int:
        """The number of requests that run or wait."""
        return len(self._open())

    @property
    def slots_of_each(self) -> int:
        """The number of slots of a replica; 0 while none is alive."""
        return next((lane.replica.slots for lane in list(self._lanes.values())), 0)

    @property
    def closed(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._closed

    @property
    def suspects(self) -> int:
        """The number of requests whose last replica died, and that have had no new token since."""
        with self._lock:
            return sum(one.suspect for one in self._open())

    def join(self, replica: Replica) -> None:
        """Take a replica that is ready.

        Raises:
            BundleError: its bundle, code, kernels, target or limits are not those of the other replicas.
            StoppedError: the fleet is stopping.
        """
        with self._lock:
            if self._closed:
                raise StoppedError("the server is stopping and takes no more replicas")
            self._identity = self._identity or replica.identity
            if different := replica.identity.differences(self._identity):
                raise BundleError(
                    f"replica {replica.name} differs from the others in: {', '.join(different)}; "
                    "give all nodes the same bundle and the same version of glm4-deploy"
                )
            self._lanes[replica.name] = Lane(replica)
            self._alone_since = None
            homeless, self._homeless = self._homeless, deque()
            for migration in homeless:
                self._place(migration, None)

    def deliver(self, name: str, report: ReplicaReport) -> None:
        """Take a replica's report."""
        with self._lock:
            lane = self._lanes.get(name)
        if lane is None:
            return
        for number, event in report.events:
            migration = lane.running.get(number)
            if migration is not None and migration.take(number, event):
                self._ended(lane, number)
        with self._lock:
            lane.stats = report.stats
            lane.reports += 1
            if lane.lone_waits:
                self._set_aside(lane)  # here alone: no event of this lane is on its way to a listener
            self._pump(lane)

    def lost(self, name: str, reason: str) -> None:
        """Send the requests of a replica that died to others."""
        with self._lock:
            lane = self._lanes.pop(name, None)
            if lane is None:
                return
            logger.error("replica %s is lost: %s", name, reason)
            self.deaths += 1
            self._gone(lane)
            given_up = [
                (one, error)
                for number, one in lane.running.items()
                if (error := one.leave(reason, lane.alone(number)))
            ]
            gone = {id(one) for one, _ in given_up}
            for one in (*lane.running.values(), *lane.waiting):
                if id(one) not in gone and not one.closed:
                    self.migrations += 1
                    logger.warning(
                        "request %s leaves replica %s after %d tokens", one.request.id, name, one.generated
                    )
                    self._place(one, None)
        for migration, error in given_up:
            migration.fail(error)

    def retire(self, name: str) -> None:
        """Give a replica no more requests, and close it when its own have ended. Blocks until then.

        Requests that wait for it go to others.
        """
        with self._lock:
            lane = self._lanes.get(name)
            if lane is None:
                return
            lane.retiring = True
            waiting, lane.waiting = lane.waiting, deque()
            for migration in waiting:
                self._place(migration, None)
        while not self._left(lane):
            time.sleep(_TICK)
        lane.replica.close()

    def _left(self, lane: Lane) -> bool:
        """Let a replica without requests leave. Returns whether it has left."""
        with self._lock:
            if (lane.running or lane.waiting) and not self._closed:
                return False
            if self._lanes.pop(lane.replica.name, None) is not None:
                self._gone(lane)
            return True

    def succeeded(self) -> None:
        """Take over what the fleet before has counted, after its end."""
        with self._lock:
            before, self._before = self._before, None
            if before is not None:
                self._retire(before.stats())

    def tick(self) -> None:
        """Fail requests that waited beyond their deadline, or for too long without any replica."""
        now = time.monotonic()
        with self._lock:
            waiting = [one for lane in self._lanes.values() for one in lane.waiting] + list(self._homeless)
            late = [
                one for one in waiting if one.request.deadline is not None and now >= one.request.deadline
            ]
            alone = self._alone_since is not None and now - self._alone_since > PATIENCE
            left = list(self._homeless) if alone else []
            for one in (*late, *left):
                self._remove(one)
        for one in late:
            one.fail(DeadlineError("the request waited for a replica until its deadline; allow it more time"))
        for one in left:
            one.fail(ReplicaError(f"no replica was ready for {PATIENCE:g} s; try again later"))

    def _watch_clock(self) -> None:
        while not self._stopped.wait(_TICK):
            self.tick()

    # Queues -----------------------------------------------------------------------------------------

    def _place(self, migration: Migration, most_waiting: int | None) -> bool:
        """Put a request into a replica's queue. Without replicas it waits for one. False: all queues are full."""
        staying = {name: lane for name, lane in self._lanes.items() if not lane.retiring} or self._lanes
        standings = {name: lane.standing for name, lane in staying.items()}
        name = self._router.choose(migration.ids, standings, most_waiting, migration.request.adapter)
        if name is None:
            if most_waiting is None:
                self._homeless.append(migration)
            return most_waiting is None
        lane = self._lanes[name]
        self._router.note(name, migration.ids, lane.replica.slots, migration.request.adapter)
        migration.since = lane.reports
        lane.waiting.append(migration)
        self._pump(lane)
        return True

    def _pump(self, lane: Lane) -> None:
        """Submit waiting requests while the replica has free slots."""
        while (migration := lane.next()) is not None:
            number = next(self._numbers)
            lane.running[number] = migration
            migration.since = lane.reports
            lane.replica.submit(number, migration.begin(lane.replica.name, number))
            if migration.moves:
                logger.warning("request %s goes on on replica %s", migration.request.id, lane.replica.name)
            if migration.held:
                lane.replica.act(number, "hold")
            if migration.lagging:
                lane.replica.act(number, "lag")

    def _set_aside(self, lane: Lane) -> None:
        """Let the running requests wait, for one that must be alone. They go on once it has a new token."""
        for number, migration in lane.running.items():
            lane.replica.act(number, "cancel")
            migration.pause()
            lane.waiting.append(migration)
        lane.running.clear()

    def _ended(self, lane: Lane, number: int) -> None:
        with self._lock:
            migration = lane.running.pop(number, None)
            if migration is not None and lane.replica.name in self._lanes:
                slots, adapter = lane.replica.slots, migration.request.adapter
                self._router.note(lane.replica.name, migration.ids, slots, adapter)

    def _act(self, migration: Migration, action: Action) -> None:
        """Pass an action on to the replica. Must not be called with a lock of a migration held by another thread."""
        with self._lock:
            lane = self._lanes.get(migration.replica or "")
            if lane is None or migration.number not in lane.running:
                if action == "cancel":
                    self._remove(migration)
                return
            lane.replica.act(migration.number, action)
            if action == "cancel":
                del lane.running[migration.number]
            if action in ("cancel", "lag"):
                self._pump(lane)

    def _remove(self, migration: Migration) -> None:
        for queue in (self._homeless, *(lane.waiting for lane in self._lanes.values())):
            with contextlib.suppress(ValueError):
                queue.remove(migration)

    def _open(self) -> Sequence[Migration]:
        with self._lock:
            lanes = list(self._lanes.values())
            found = [one for lane in lanes for one in (*lane.running.values(), *lane.waiting)]
            return [one for one in (*found, *self._homeless) if not one.closed]

    def _gone(self, lane: Lane) -> None:
        """Forget a replica that is no longer one of the lanes."""
        self._router.forget(lane.replica.name)
        if lane.stats is not None:
            self._retire(lane.stats)
        if not self._lanes:
            self._alone_since = time.monotonic()

    def _retire(self, stats: SchedulerStats) -> None:
        """Keep what a lost replica counted, so that no sum shrinks. Its gauges become 0."""
        gone = replace(stats, queued=0, active=0, slots=0)
        self._retired = [total([*self._retired, gone])]
