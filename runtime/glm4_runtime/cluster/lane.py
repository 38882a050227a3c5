"""One replica as the fleet sees it, and the requests that it has."""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from glm4_runtime.cluster.migration import Migration
from glm4_runtime.cluster.order import Action, Identity, Order, ReplicaReport
from glm4_runtime.cluster.router import Standing
from glm4_runtime.scheduler import SchedulerStats


class Replica(Protocol):
    """One replica as the fleet sees it. Only :meth:`report` blocks or raises.

    Attributes:
        slots: requests that it runs together.
    """

    name: str
    slots: int
    identity: Identity

    def submit(self, number: int, order: Order) -> None:
        """Run an order."""

    def act(self, number: int, action: Action) -> None:
        """Change an order that was submitted. Does nothing if the order has ended."""

    def report(self) -> ReplicaReport:
        """Wait for events, at most a second, and return them.

        Raises:
            ReplicaError: the replica has died, or does not answer.
        """

    def close(self) -> None:
        """End the replica with all its orders, without waiting for them."""


@dataclass
class Lane:
    """The requests of one replica. ``running`` ones were submitted, by the numbers of their orders."""

    replica: Replica
    running: dict[int, Migration] = field(default_factory=dict)
    waiting: deque[Migration] = field(default_factory=deque)
    stats: SchedulerStats | None = None
    reports: int = 0
    retiring: bool = False

    @property
    def standing(self) -> Standing:
        return Standing(self.replica.slots, len(self.running), len(self.waiting))

    def next(self) -> Migration | None:
        """Remove and return the next request that may run.

        A request whose client does not read keeps no other one from the replica, which parks it. Suspects run one at a
        time, so that a death shows which request was its cause. Nothing runs beside a request that must be alone.
        """
        reading = sum(not one.lagging for one in self.running.values())
        if reading >= self.replica.slots or any(one.lone for one in self.running.values()):
            return None
        tried = any(one.suspect for one in self.running.values())
        for migration in self.waiting:
            if migration.lone and (self.running or not self.alive_since(migration)):
                continue
            if not (tried and migration.suspect):
                self.waiting.remove(migration)
                return migration
        return None

    @property
    def lone_waits(self) -> bool:
        """Whether a request waits that must be alone, and could be tried now."""
        tried = any(one.suspect for one in self.running.values())
        return not tried and any(one.lone and self.alive_since(one) for one in self.waiting)

    def alive_since(self, migration: Migration) -> bool:
        """Whether the replica is known to have been alive after the request came to it, or began.

        The first report after may have been sent before. Replicas of one node die together: without this test, a
        request could go from one to the next before their deaths are noticed.
        """
        return self.reports >= migration.since + 2

    def alone(self, number: int) -> bool:
        """Whether the replica ran this order only, and was alive after it had begun."""
        return len(self.running) == 1 and self.alive_since(self.running[number])
