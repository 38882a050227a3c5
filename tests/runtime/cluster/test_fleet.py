"""The fleet moves requests from dead replicas to others, and nobody sees the move. No test here needs Ray."""

import itertools
import random
import threading
import time

import pytest
from fake_replicas import NO_STATS, FakeReplica, deliver, plain, report, token
from local_replicas import LocalReplica, joined
from resumable import KINDS, compiler_of, request_of_kind
from scheduling import Listener, drive, submit

from glm4_runtime import SamplingParams, Session
from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.order import Identity, ReplicaReport
from glm4_runtime.cluster.watch import watch
from glm4_runtime.errors import (
    BundleError,
    DamagedModelError,
    DeadlineError,
    QueueFullError,
    ReplicaError,
    StoppedError,
)
from glm4_runtime.scheduler import Failed, Request, Scheduler, Started


@pytest.fixture
def fleet():
    fleet = Fleet(max_queue=2)
    yield fleet
    fleet.stop(0)


def test_a_request_goes_on_elsewhere_with_the_tokens_that_its_client_has(fleet):
    first, second, listener = FakeReplica("a"), FakeReplica("b"), Listener()
    fleet.join(first)
    fleet.submit(plain(prompt_logprobs=2), listener)
    deliver(fleet, first, Started(0, 3), token(7), token(8))
    fleet.join(second)
    fleet.lost("a", "it was killed")
    begun, order = first.orders[first.last].request, second.orders[second.last].request
    assert order.generated == (7, 8)
    assert order.params.seed == begun.params.seed is not None
    assert (begun.prompt_logprobs, order.prompt_logprobs) == (2, None)
    deliver(fleet, second, token(9, "stop"))
    assert listener.ids == [7, 8, 9]
    assert fleet.stats().active == 1  # as the replica last said
    assert fleet.migrations == 1


def test_a_second_start_is_not_told(fleet):
    first, second, listener = FakeReplica("a"), FakeReplica("b"), Listener()
    fleet.join(first)
    fleet.submit(plain(), listener)
    deliver(fleet, first, Started(0, 3))
    fleet.lost("a", "it was killed")
    fleet.join(second)  # meanwhile the request has waited
    deliver(fleet, second, Started(2, 3), token(9, "stop"))
    assert listener.started == Started(0, 3)
    assert listener.ids == [9]


def test_a_request_that_kills_its_replicas_is_given_up_after_two(fleet):
    listener, replicas = Listener(), [FakeReplica(name) for name in "abc"]
    for replica in replicas:
        fleet.join(replica)
    fleet.submit(plain(), listener)
    for _ in range(2):
        (holder,) = [one for one in replicas if one.orders and not one.closed]
        report(fleet, holder, 2)
        holder.close()
        fleet.lost(holder.name, "it was killed")
    assert isinstance(listener.error, ReplicaError)
    assert "2 replicas died while they ran this request" in str(listener.error)
    assert sum(len(one.orders) for one in replicas) == 2


def test_suspects_run_one_at_a_time_so_that_only_the_cause_is_given_up(fleet):
    fleet = Fleet(max_queue=8)
    listeners = [Listener() for _ in range(3)]
    names = itertools.count()
    replica = FakeReplica("first", slots=3)
    fleet.join(replica)
    for number, listener in enumerate(listeners):
        fleet.submit(Request((number, 1), SamplingParams()), listener)
    for _ in range(30):
        report(fleet, replica, 2)
        orders, running = replica.orders, [order.request.prompt_ids[0] for order in replica.orders.values()]
        if 1 in running:  # the poison
            fleet.lost(replica.name, "it was killed")
            replica = FakeReplica(str(next(names)), slots=3)
            fleet.join(replica)
        else:
            for number in list(orders):
                deliver(fleet, replica, Started(0, 2), token(4, "stop"), number=number)
                del orders[number]
    assert [one.error is None for one in listeners] == [True, False, True]
    fleet.stop(0)


def test_a_long_request_survives_many_deaths_if_tokens_come_between(fleet):
    listener = Listener()
    replica = FakeReplica("0")
    fleet.join(replica)
    fleet.submit(plain(), listener)
    deliver(fleet, replica, Started(0, 3))
    for death in range(1, 9):
        deliver(fleet, replica, token(death))
        fleet.lost(replica.name, "it was killed")
        replica = FakeReplica(str(death))
        fleet.join(replica)
    deliver(fleet, replica, token(99, "stop"))
    assert listener.ids == [*range(1, 9), 99]


def test_queues_are_bounded_and_a_full_fleet_says_when_to_come_back(fleet):
    replica = FakeReplica("a")
    fleet.join(replica)
    listeners = [Listener() for _ in range(4)]
    handles = [fleet.submit(plain(), listener) for listener in listeners]
    assert len(replica.orders) == 2
    with pytest.raises(QueueFullError) as refused:
        fleet.submit(plain(), Listener())
    assert refused.value.retry_after >= 1
    assert fleet.stats().queued == 2
    handles[2].cancel()
    assert fleet.stats().queued == 1
    handles[0].cancel()  # its place goes to the waiting one at once
    assert (0, "cancel") in replica.actions
    assert len(replica.orders) == 3


def test_a_client_that_does_not_read_keeps_nobody_from_the_replica(fleet):
    replica = FakeReplica("a", slots=1)
    fleet.join(replica)
    slow = fleet.submit(plain(), Listener())
    fleet.submit(plain(), Listener())
    assert len(replica.orders) == 1
    slow.lag()
    assert len(replica.orders) == 2
    assert replica.actions == [(0, "lag")]


def test_events_of_a_lost_or_cancelled_order_are_not_told(fleet):
    first, second, listener = FakeReplica("a"), FakeReplica("b"), Listener()
    fleet.join(first)
    handle = fleet.submit(plain(), listener)
    fleet.lost("a", "it was killed")
    fleet.join(second)
    deliver(fleet, first, Started(0, 3), token(1))
    assert listener.started is None
    handle.cancel()
    deliver(fleet, second, Started(0, 3), token(1))
    assert listener.started is None


def test_replicas_that_differ_do_not_join(fleet):
    fleet.join(FakeReplica("a"))
    other = Identity("other bundle", "code", "other kernels", "cpu", (512, 4))
    with pytest.raises(BundleError, match="replica b differs from the others in: bundle, kernels"):
        fleet.join(FakeReplica("b", identity=other))


def test_without_a_replica_requests_are_refused_and_moved_ones_wait_until_their_deadline(fleet, monkeypatch):
    with pytest.raises(ReplicaError, match="no replica is ready"):
        fleet.submit(plain(), Listener())
    replica, soon, later = FakeReplica("a"), Listener(), Listener()
    fleet.join(replica)
    fleet.submit(plain(deadline=time.monotonic() - 1), soon)
    fleet.submit(plain(deadline=time.monotonic() + 600), later)
    fleet.lost("a", "it was killed")
    fleet.tick()
    assert isinstance(soon.error, DeadlineError)
    assert later.error is None
    monkeypatch.setattr("glm4_runtime.cluster.fleet.PATIENCE", 0)
    fleet.tick()
    assert isinstance(later.error, ReplicaError)


def test_deadlines_hold_while_no_replica_is_alive(fleet):
    """No report comes then, so nothing but the clock ends a request."""
    replica, listener = FakeReplica("a"), Listener()
    fleet.start()
    fleet.join(replica)
    fleet.submit(plain(deadline=time.monotonic() + 0.2), listener)
    fleet.lost("a", "it was killed")
    assert listener.done.wait(20)
    assert isinstance(listener.error, DeadlineError)


def test_a_listener_that_fails_loses_its_own_request_only(fleet):
    replica, other = FakeReplica("a"), Listener()

    def broken(event):
        raise RuntimeError("a client's mistake")

    fleet.join(replica)
    fleet.submit(plain(), broken)
    fleet.submit(plain(), other)
    deliver(fleet, replica, Started(0, 3), number=0)
    assert replica.actions == [(0, "cancel")]
    deliver(fleet, replica, Started(0, 3), token(7, "stop"), number=1)
    assert other.ids == [7]


def test_a_replica_that_cannot_be_watched_is_lost_and_its_requests_move(fleet):
    first, second, listener = FakeReplica("a"), FakeReplica("b"), Listener()

    def unreadable():
        raise TypeError("no such event")

    first.report = unreadable
    fleet.join(first)
    fleet.submit(plain(), listener)
    fleet.join(second)
    watch(fleet, first, 1.0)
    assert first.closed
    assert len(second.orders) == 1


def test_sums_do_not_shrink_when_a_replica_is_lost(fleet):
    replica = FakeReplica("a")
    fleet.join(replica)
    fleet.deliver("a", ReplicaReport((), NO_STATS, 0.0))
    before = fleet.stats()
    fleet.lost("a", "it was killed")
    after = fleet.stats()
    assert (before.generated_tokens, before.slots) == (3, 2)
    assert (after.generated_tokens, after.slots, after.requests) == (3, 0, {"stop": 1})


def test_stopping_ends_what_is_left(fleet):
    replica, listener = FakeReplica("a"), Listener()
    fleet.join(replica)
    fleet.submit(plain(), listener)
    fleet.stop(0.05)
    assert isinstance(listener.error, StoppedError)
    assert replica.closed
    with pytest.raises(StoppedError):
        fleet.submit(plain(), Listener())


# With real sessions -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(demo_cpu):
    with Session.open(demo_cpu, threads=1) as session:
        yield session


def test_answers_are_those_of_an_undisturbed_run_whenever_replicas_die(session, demo_cpu):
    grammars, chance = compiler_of(session), random.Random(5)
    kinds = [*KINDS] * 2
    wanted = {}
    for kind in KINDS:
        scheduler = Scheduler(session)
        listener, _ = submit(scheduler, request_of_kind(kind, session, grammars))
        end = time.monotonic() + 60
        while not listener.done.is_set() and time.monotonic() < end:
            drive(scheduler, 10)
        scheduler.stop()
        wanted[kind] = [repr(one) for one in listener.tokens], listener.tops
    fleet, names = Fleet(max_queue=64), itertools.count()
    alive = [joined(fleet, LocalReplica(str(next(names)), demo_cpu)) for _ in range(2)]
    listeners = {number: Listener() for number in range(len(kinds))}
    for number, kind in enumerate(kinds):
        fleet.submit(request_of_kind(kind, session, grammars), listeners[number])
    gone = []
    for kill in range(1, 7):
        end = time.monotonic() + 60
        while fleet.suspects or sum(len(one.tokens) for one in listeners.values()) < 40 * kill:
            assert time.monotonic() < end
            time.sleep(0.002)
        victim = alive.pop(chance.randrange(2))
        victim.kill()
        gone.append(victim)
        alive.append(joined(fleet, LocalReplica(str(next(names)), demo_cpu)))
    for number, listener in listeners.items():
        assert listener.done.wait(60), kinds[number]
        assert listener.error is None, (kinds[number], listener.error)
        assert ([repr(one) for one in listener.tokens], listener.tops) == wanted[kinds[number]], kinds[number]
    assert fleet.migrations > 0
    for replica in alive:
        view = replica.scheduler.view()
        assert not view.running
        assert not view.waiting
    fleet.stop(0)


def test_a_replica_that_computes_nan_or_hangs_is_replaced(session, demo_cpu, monkeypatch):
    for fault in ("nan", "hang"):
        fleet, listener = Fleet(max_queue=8), Listener()
        bad = LocalReplica("bad", demo_cpu)
        release, decode = threading.Event(), bad.session.decode_block

        def broken(tokens, fault=fault, release=release, decode=decode):
            if fault == "hang":
                release.wait(30)
            slots, logits = decode(tokens)
            return slots, logits * float("nan")

        monkeypatch.setattr(bad.session, "decode_block", broken)
        monkeypatch.setattr(bad, "close", bad.dead.set)
        joined(fleet, bad, step_timeout=0.3)
        request = request_of_kind("greedy", session, compiler_of(session))
        fleet.submit(request, listener)
        end = time.monotonic() + 30
        while "bad" in fleet.stats_by_replica() or not fleet.deaths:
            assert time.monotonic() < end
            time.sleep(0.01)
        joined(fleet, LocalReplica("good", demo_cpu))
        assert listener.done.wait(60)
        assert listener.error is None
        assert listener.ids == [one.id for one in session.generate(request.prompt_ids, request.params)]
        release.set()
        fleet.stop(0)
        bad.work.close()


def test_the_error_of_nan_is_not_told(fleet):
    """Were it told, the client would lose its answer."""
    replica, listener = FakeReplica("a"), Listener()
    reports = iter([ReplicaReport(((0, Failed(DamagedModelError("NaN"))),), NO_STATS, 0.0)])
    replica.report = lambda: next(reports)
    fleet.join(replica)
    fleet.submit(plain(), listener)
    watch(fleet, replica, 1.0)
    assert replica.closed
    assert listener.error is None
