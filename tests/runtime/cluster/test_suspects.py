"""A request is given up only if a replica died that ran nothing else. No test here needs Ray."""

import json
import logging

import pytest
from fake_replicas import FakeReplica, deliver, plain, report, token
from local_replicas import LocalReplica, joined
from scheduling import Listener

from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.errors import ReplicaError
from glm4_runtime.scheduler import Started


@pytest.fixture
def fleet():
    fleet = Fleet(max_queue=8)
    yield fleet
    fleet.stop(0)


def replaced(fleet, replica, name):
    """The next replica, after the death of the last one."""
    fleet.lost(replica.name, "it was killed")
    new = FakeReplica(name, slots=4)
    fleet.join(new)
    return new


def start(fleet, count):
    replica = FakeReplica("a", slots=4)
    fleet.join(replica)
    listeners = [Listener() for _ in range(count)]
    for listener in listeners:
        fleet.submit(plain(), listener)
    return replica, listeners


def test_two_quick_deaths_cost_no_request(fleet):
    replica, listeners = start(fleet, 3)
    for name in "bc":
        replica = replaced(fleet, replica, name)
    report(fleet, replica, 2)
    while not all(one.done.is_set() for one in listeners):
        deliver(fleet, replica, Started(0, 3), token(4, "stop"))
    assert [one.error for one in listeners] == [None] * 3
    assert [one.ids for one in listeners] == [[4]] * 3


def test_after_two_deaths_a_suspect_runs_alone_and_a_third_death_is_its_own(fleet):
    replica, (suspect, *_) = start(fleet, 1)
    other = Listener()
    replica = replaced(fleet, replica, "b")
    fleet.submit(plain(), other)
    assert len(replica.orders) == 2
    deliver(fleet, replica, Started(0, 3), token(5))  # the other one has a token, and is no suspect
    replica = replaced(fleet, replica, "c")
    (bystander,) = replica.orders.values()
    assert bystander.request.generated == (5,)
    report(fleet, replica, 1)
    assert len(replica.orders) == 1  # this report may have been sent before the death
    report(fleet, replica, 1)  # the suspect waits for the bystander's token, as that is a suspect as well
    deliver(fleet, replica, token(6))
    assert replica.actions[-1] == (min(replica.orders), "cancel")
    assert replica.orders[replica.last].request.generated == ()
    report(fleet, replica, 3)
    assert len(replica.orders) == 2, "nothing runs beside a request that must be alone"
    replica = replaced(fleet, replica, "d")
    assert isinstance(suspect.error, ReplicaError)
    assert "3 replicas died" in str(suspect.error)
    assert replica.orders[replica.last].request.generated == (5, 6)
    deliver(fleet, replica, token(7, "stop"))
    assert (other.ids, other.error) == ([5, 6, 7], None)


def test_those_set_aside_go_on_once_the_suspect_has_a_token(fleet):
    replica, (suspect, *_) = start(fleet, 1)
    for name in "bc":
        replica = replaced(fleet, replica, name)
    other = Listener()
    fleet.submit(plain(), other)
    deliver(fleet, replica, Started(0, 3), token(5))
    report(fleet, replica, 1)
    deliver(fleet, replica, Started(0, 3), token(8))
    assert len(replica.orders) == 3
    assert replica.orders[replica.last].request.generated == (5,)
    deliver(fleet, replica, token(6, "stop"))
    deliver(fleet, replica, token(9, "stop"), number=replica.last - 1)
    assert (other.ids, suspect.ids) == ([5, 6], [8, 9])


def test_a_request_that_was_alone_on_two_replicas_is_given_up(fleet):
    replica, (listener,) = start(fleet, 1)
    report(fleet, replica, 2)
    replica = replaced(fleet, replica, "b")
    report(fleet, replica, 2)
    replica = replaced(fleet, replica, "c")
    assert isinstance(listener.error, ReplicaError)
    assert not replica.orders


def test_deaths_of_one_node_are_no_evidence(fleet):
    """The second replica died with the first, before it could begin: nothing is known of the request."""
    first, second = FakeReplica("a"), FakeReplica("b")
    fleet.join(first)
    fleet.join(second)
    listener = Listener()
    fleet.submit(plain(), listener)
    report(fleet, first, 2)
    fleet.lost("a", "its node died")
    fleet.lost("b", "its node died")
    assert listener.error is None


def test_the_id_of_a_request_joins_the_lines_of_the_server_and_of_replicas(fleet, demo_cpu, caplog):
    caplog.set_level(logging.INFO, "glm4_runtime.cluster")
    dead, listener = FakeReplica("a"), Listener()
    fleet.join(dead)
    fleet.submit(plain(id="req_7"), listener)
    fleet.lost("a", "it was killed")
    replica = joined(fleet, LocalReplica("b", demo_cpu))
    assert listener.done.wait(30)
    moved = [one.getMessage() for one in caplog.records if one.name.endswith("fleet")]
    assert "request req_7 leaves replica a after 0 tokens" in moved
    assert "request req_7 goes on on replica b" in moved
    (line,) = [json.loads(one.getMessage()) for one in caplog.records if one.name.endswith("work")]
    assert (line["event"], line["id"], line["tokens"]) == ("order", "req_7", len(listener.ids))
    assert line["outcome"] == listener.tokens[-1].finish_reason
    replica.kill()
