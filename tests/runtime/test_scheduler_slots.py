"""Who owns a slot: a lease is worth something while the table names it, and nothing before or after."""

import numpy as np
import pytest
from history_session import HistorySession

from glm4_runtime.errors import SlotError
from glm4_runtime.scheduler.slots import Slots


def sequence(length, seed=0, room=20):
    """Tokens, and room for more of them."""
    return np.random.default_rng(seed).integers(1, 40, length + room)


@pytest.fixture
def session():
    return HistorySession(slots=3)


@pytest.fixture
def slots(session):
    return Slots(session, prefix_cache=True)


def kept(slots, ids, prompt):
    """Run a sequence of ``prompt`` tokens and leave it to the prefix cache; its lease, which is over."""
    lease = slots.lease(ids, prompt)
    slots.feed(lease, prompt - lease.fed)
    slots.end(lease, keep=True)
    return lease


def test_a_lease_that_is_over_can_do_nothing(session, slots):
    stale = kept(slots, sequence(30), 30)
    work = {
        "feed": lambda: slots.feed(stale, 1),
        "run": lambda: slots.run({stale: [5]}),
        "run a draft": lambda: slots.run({stale: [5, 6]}),
        "cut": lambda: slots.cut(stale),
        "end": lambda: slots.end(stale, keep=False),
    }
    current = slots.lease(sequence(30), 30)  # in the same slot, where 29 tokens are reused
    slots.feed(current, 1)
    assert (current.slot, current.cached) == (stale.slot, 29)
    for call in work.values():
        with pytest.raises(SlotError, match="another sequence"):
            call()
    assert session.history(current.slot) == sequence(30)[:30].tolist()


def test_one_stale_lease_keeps_a_whole_step_from_running(session, slots):
    stale = kept(slots, sequence(30), 30)
    other = slots.lease(sequence(20, seed=1), 20)
    slots.feed(other, 20)
    with pytest.raises(SlotError):
        slots.run({other: [5], stale: [5]})
    assert (other.fed, session.length(other.slot)) == (20, 20)


def test_a_discarded_slot_is_not_a_prefix_any_more(session, slots):
    lease = slots.lease(sequence(30), 30)
    slots.feed(lease, 30)
    slots.end(lease, keep=False)
    assert session.free_slots() == [0, 1, 2]
    assert slots.lease(sequence(30), 30).cached == 0


def test_an_evicted_slot_is_not_a_prefix_any_more(slots):
    for seed in range(3):
        kept(slots, sequence(30, seed), 30)
    assert kept(slots, sequence(30, seed=9), 30).slot == 0
    assert slots.lease(sequence(30, seed=0), 30).cached == 0


def test_a_copy_is_a_use_of_its_source(slots):
    for seed in range(3):
        kept(slots, sequence(40, seed), 40)
    copy = np.concatenate((sequence(40)[:16], sequence(30, seed=8)))
    assert slots.lease(copy, 30).cached == 16
    assert kept(slots, sequence(30, seed=11), 30).slot == 2
    assert slots.lease(sequence(40), 40).cached == 39


def test_a_kept_slot_holds_what_was_right_of_a_draft_and_no_more(session, slots):
    ids = sequence(20)
    lease = slots.lease(ids, 20)
    slots.feed(lease, 20)
    slots.run({lease: [int(ids[20]), 7, 8, 9]})
    lease.fed += 2
    slots.end(lease, keep=True)
    assert session.history(lease.slot) == [*ids[:21].tolist(), 7]


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_prefix_that_cannot_be_copied_is_computed(session, slots, error):
    kept(slots, sequence(80), 80)

    def fail(_move):
        raise error

    session.before_move = fail
    lease = slots.lease(sequence(30, room=50), 30)
    assert (lease.slot, lease.cached, lease.fed) == (1, 0, 0)
    slots.feed(lease, 30)
    assert session.history(1) == sequence(30)[:30].tolist()


def test_memory_that_cannot_be_zeroed_loses_no_slot(session, slots):
    lease = slots.lease(sequence(30), 30)
    slots.feed(lease, 30)

    def fail(_row):
        raise RuntimeError

    session.before_clear = fail
    slots.end(lease, keep=False)
    assert session.free_slots() == [0, 1, 2]
    assert [slots.lease(sequence(9, seed), 9).slot for seed in range(3)] == [0, 1, 2]


def test_without_the_prefix_cache_nothing_is_shared(session):
    slots = Slots(session, prefix_cache=False)
    first = slots.lease(sequence(30), 30)
    slots.feed(first, 30)
    second = slots.lease(sequence(30), 30)
    assert (second.slot, second.cached) == (1, 0)
    assert not slots.should_wait(sequence(30), [sequence(30)])
    slots.end(first, keep=True)
    assert session.free_slots() == [0, 1, 2]


def test_closing_takes_every_slot_back(session, slots):
    kept(slots, sequence(30), 30)
    lost = slots.lease(sequence(30, seed=1), 30)
    slots.feed(lost, 30)
    slots.close()
    assert session.free_slots() == [0, 1, 2]
    with pytest.raises(SlotError):
        slots.feed(lost, 1)
