"""Replicas that record their orders; the test plays the events."""

from local_replicas import SAME

from glm4_runtime import SamplingParams
from glm4_runtime.cluster.order import ReplicaReport
from glm4_runtime.generate import Token
from glm4_runtime.scheduler import Generated, Request, SchedulerStats

NO_STATS = SchedulerStats(0, 1, 2, 5, 0, 3, 0, 0, {"stop": 1}, 4, 0.5, 0.25)


class FakeReplica:
    def __init__(self, name, slots=2, identity=SAME):
        self.name, self.slots, self.identity = name, slots, identity
        self.orders, self.actions, self.closed = {}, [], False

    def submit(self, number, order):
        self.orders[number] = order

    def act(self, number, action):
        self.actions.append((number, action))

    def close(self):
        self.closed = True

    @property
    def last(self):
        return max(self.orders)


def deliver(fleet, replica, *events, number=None):
    """Events of one order, the last one begun if none is named."""
    number = replica.last if number is None else number
    fleet.deliver(replica.name, ReplicaReport(tuple((number, event) for event in events), NO_STATS, 0.0))


def report(fleet, replica, count):
    """So many reports without events."""
    for _ in range(count):
        fleet.deliver(replica.name, ReplicaReport((), NO_STATS, 0.0))


def token(id, reason=None):
    return Generated(Token(id, f"<{id}>", -0.5, reason))


def plain(**more):
    return Request((1, 2, 3), SamplingParams(temperature=1.0), **more)
