"""The keeper starts replicas and replaces them, whatever a start raises. No test here needs Ray."""

import threading

import pytest
from local_replicas import SAME

from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.keeper import Keeper
from glm4_runtime.errors import BundleError, ReplicaError


class Dying:
    """A replica that dies when ``end`` is set."""

    slots, identity = 1, SAME

    def __init__(self, name):
        self.name, self.end, self.closed = name, threading.Event(), threading.Event()

    def report(self):
        self.end.wait(30)
        raise ReplicaError("it was killed")

    def close(self):
        self.end.set()
        self.closed.set()


@pytest.fixture
def fleet():
    fleet = Fleet(8)
    yield fleet
    fleet.stop(0)


def test_a_replica_is_replaced_even_after_a_start_that_fails_unexpectedly(fleet, monkeypatch):
    monkeypatch.setattr("glm4_runtime.cluster.keeper._FIRST_PAUSE", 0.01)
    made, third = [], threading.Event()

    def make(name):
        made.append(Dying(name))
        if len(made) == 2:
            raise RuntimeError("no such thing")
        if len(made) == 3:
            third.set()
        return made[-1]

    keeper = Keeper(fleet, make, 9.0)
    keeper.start(1)
    assert fleet.ready
    made[0].end.set()
    assert third.wait(20)
    assert made[0].closed.wait(20)
    keeper.stop()


@pytest.mark.parametrize("error", [BundleError("no bundle"), RuntimeError("no such thing")])
def test_the_error_of_a_first_start_is_told(fleet, error):
    def make(name):
        if name == "1":
            raise error
        return Dying(name)

    with pytest.raises((BundleError, ReplicaError), match=str(error)):
        Keeper(fleet, make, 9.0).start(2)
