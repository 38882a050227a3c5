"""Stages that overlap: chunks of prompts and groups of requests are in several stages at once, with the same results."""

import threading

import numpy as np
import pytest
from cpu_operators import needs_cpu_operators
from history_session import HistorySession
from history_stages import HistoryStages
from remote_stages import remote
from scheduling import Listener

from glm4_runtime.errors import ModelError, RequestError
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Request, Scheduler
from glm4_runtime.scheduler.groups import Grouping
from glm4_runtime.session import Session

LATEST = 60


@pytest.fixture
def session():
    """Two stages that overlap; chunks have 6 tokens."""
    return HistoryStages(slots=4)


def fail_once(session, token):
    """Let the next run fail that ends with this token."""

    def run(histories):
        if any(history[-1] == token for history in histories):
            session.tokens.before_run = lambda *_: None
            raise ModelError(f"token {token}")

    session.tokens.before_run = run


# Chunks of a prompt -------------------------------------------------------------------------------


def test_a_run_without_logits_returns_before_it_has_ended(session):
    assert session.prefill(0, [1, 2, 3], "none").shape == (0, 48)
    assert len(session.tokens.queue) == 1
    assert session.length(0) == 3
    assert session.prefill(0, list(range(1, 40)), "none").shape == (0, 48)
    assert len(session.tokens.queue) == 2  # one for each stage
    assert session.history(0) == [1, 2, 3, *range(1, 40)]


def test_an_error_that_comes_late_stays_until_the_slot_is_truncated(session):
    session.prefill(1, [7, 8])
    session.prefill(0, [1, 2, 3])
    fail_once(session, 6)
    session.prefill(0, [4, 5, 6], "none")
    calls = (
        lambda: session.decode({0: 9, 1: 9}),
        lambda: session.copy_prefix(0, 2, 2),
        lambda: session.read_positions(0, 0, 2),
        lambda: session.prefill(0, [9]),
    )
    for call in calls:
        with pytest.raises(ModelError, match="token 6"):
            call()
    assert session.length(1) == 2
    session.truncate(0, 3)
    session.decode({0: 9, 1: 9})
    assert (session.history(0), session.history(1)) == ([1, 2, 3, 9], [7, 8, 9])


@pytest.mark.parametrize("held", [(), (1, 2, 3)])
@pytest.mark.parametrize("free", ["release", "discard"])
def test_an_error_ends_with_its_slot(session, held, free):
    if held:
        session.prefill(0, held)
    fail_once(session, 6)
    session.prefill(0, [4, 5, 6], "none")
    getattr(session, free)(0)
    session.prefill(0, [7, 8])
    assert session.history(0) == [7, 8]


@pytest.mark.parametrize("token", [6, 12, 14])
@pytest.mark.parametrize("logits", ["last", "all", 9])
def test_a_prefill_that_fails_changes_nothing(session, token, logits):
    """In its first, second or last chunk."""
    session.prefill(0, [20, 21])
    fail_once(session, token)
    with pytest.raises(ModelError):
        session.prefill(0, range(1, 15), logits)
    assert session.history(0) == [20, 21]
    session.prefill(0, [22])
    assert session.history(0) == [20, 21, 22]


@pytest.mark.parametrize("kind", [HistoryStages, HistorySession])
def test_the_cache_fits_all_chunks_whatever_comes_between(kind):
    """A step of another slot must not shrink the cache that the chunks to come need."""
    session = kind(slots=2, max_seq_len=1024, prefill_chunk=100)
    session.prefill(1, [5])
    blocks = session.score(list(np.arange(900) % 40), 100)
    next(blocks)
    session.decode({1: 6})
    for _ in blocks:
        session.decode({1: 7})
    assert session.history(1) == [5, 6, *[7] * 8]


@pytest.mark.parametrize("kind", [HistoryStages, HistorySession])
def test_a_prompt_gets_its_cache_once(kind):
    """A cache that grows chunk by chunk would stop the stages for each copy."""
    session, resized = kind(slots=2, max_seq_len=1024, prefill_chunk=100), []
    resize = session._resize_cache
    session._resize_cache = lambda capacity: (resized.append(capacity), resize(capacity))
    session.prefill(0, np.arange(900) % 40)
    assert resized == [1024]


def test_logits_has_a_count_or_a_name(session):
    for wrong in ("some", -1, 4, True, 1.0):
        with pytest.raises(RequestError, match=r"must be 'none', 'last', 'all' or 0 \.\.\. 3"):
            session.prefill(0, [1, 2, 3], wrong)


# Groups of requests -------------------------------------------------------------------------------


def test_groups_run_in_rows_of_their_own(session):
    """No row moves when two groups take turns."""
    moves = []
    session.tokens.before_move = moves.append
    for slot in range(4):
        session.prefill(slot, [slot + 1])
    first, second = session.begin_decode({0: 5, 1: 5}), session.begin_decode({2: 6, 3: 6})
    for token in (7, 8):
        slots, logits = first.result()
        assert (slots, logits.shape) == ([0, 1], (2, 48))
        first = session.begin_decode({0: token, 1: token})
        second.result()
        second = session.begin_decode({2: token, 3: token})
    first.result()
    second.result()
    assert moves == []
    assert [session.history(slot) for slot in (1, 3)] == [[2, 5, 7, 8], [4, 6, 7, 8]]
    session.release(1)
    session.decode({0: 9, 2: 9, 3: 9})
    assert len(moves) == 1
    assert [session.history(slot)[-2:] for slot in (0, 2, 3)] == [[8, 9]] * 3


def test_a_step_that_fails_changes_no_slot(session):
    for slot in range(4):
        session.prefill(slot, [slot + 1])
    fail_once(session, 13)
    steps = session.begin_decode({0: 13, 1: 5}), session.begin_decode({2: 6, 3: 6})
    with pytest.raises(ModelError):
        steps[0].result()
    steps[1].result()
    assert [session.length(slot) for slot in range(4)] == [1, 1, 2, 2]
    session.decode({0: 7, 1: 7, 2: 7, 3: 7})
    assert [session.history(slot) for slot in range(4)] == [[1, 7], [2, 7], [3, 6, 7], [4, 6, 7]]


def judged(seconds, requests=8, most=2):
    """The choice after each number of groups was measured."""
    grouping = Grouping(most)
    for _ in range(30):
        groups = grouping.groups(requests)
        grouping.measured(requests, groups, seconds[groups])
    return grouping.groups(requests)


def test_as_many_groups_as_measurements_say():
    assert judged({1: 1.0, 2: 0.8}) == 2
    assert judged({1: 1.0, 2: 1.1}) == 1
    assert judged({1: 1.0, 2: 0.99}) == 1  # too little for the delay
    assert judged({1: 1.0, 2: 0.8, 3: 0.6}, most=3) == 3
    assert judged({1: 1.0}, requests=1) == 1


def test_numbers_of_requests_are_judged_apart_and_again():
    grouping = Grouping(2)
    seconds = {8: {1: 1.0, 2: 0.8}, 2: {1: 1.0, 2: 1.3}}

    def run(steps):
        for _ in range(steps):
            for requests, known in seconds.items():
                groups = grouping.groups(requests)
                grouping.measured(requests, groups, known[groups])
        return [grouping.groups(requests) for requests in seconds]

    assert run(30) == [2, 1]
    seconds[8][2], seconds[2][2] = 1.4, 0.7
    assert run(3000) == [1, 2]


# With a real model ----------------------------------------------------------------------------------


@pytest.fixture
def staged(demo_staged):
    with Session.open(demo_staged, threads=1) as session:
        yield remote(session)


@needs_cpu_operators
def test_a_stage_works_on_a_chunk_while_the_next_works_on_the_one_before(staged):
    """The last stage waits in its first chunk until the first stage has begun the second."""
    first, last = staged._stages
    begun, runs = threading.Event(), []

    def run_first(values, step, run=first.inner.run):
        runs.append(values.shape)
        if len(runs) == 2:
            begun.set()
        return run(values, step)

    def run_last(values, step, run=last.inner.run):
        assert begun.wait(LATEST)
        return run(values, step)

    first.inner.run, last.inner.run = run_first, run_last
    staged.prefill(0, range(5, 305))
    assert runs == [(1, 128), (1, 128), (1, 44)]


@needs_cpu_operators
def test_answers_of_groups_are_those_of_a_single_session(staged, demo_cpu, monkeypatch):
    """Long and short prompts, greedy and sampled, with two groups whatever they cost."""
    monkeypatch.setattr(Grouping, "groups", lambda _, requests: min(2, requests))
    rng = np.random.default_rng(3)
    asked = [
        Request(
            tuple(rng.integers(5, 2000, rng.integers(2, 400)).tolist()),
            SamplingParams(max_tokens=20, ignore_eos=True, temperature=float(number % 2), seed=number),
        )
        for number in range(9)
    ]
    with Session.open(demo_cpu, threads=1) as single:
        wanted = [[one.id for one in single.generate(each.prompt_ids, each.params)] for each in asked]
    scheduler, listeners = Scheduler(staged, step_tokens=256), [Listener() for _ in asked]
    for each, listener in zip(asked, listeners, strict=True):
        scheduler.submit(each, listener)
    scheduler.start()
    assert all(listener.done.wait(LATEST) for listener in listeners)
    scheduler.stop()
    assert [listener.ids for listener in listeners] == wanted


@needs_cpu_operators
def test_a_lost_stage_ends_all_requests_and_the_readiness(staged):
    scheduler, listeners = Scheduler(staged), [Listener() for _ in range(6)]
    for number, listener in enumerate(listeners):
        params = SamplingParams(max_tokens=300, ignore_eos=True, temperature=0)
        scheduler.submit(Request((5, 6, 7 + number), params), listener)
    for _ in range(10):
        scheduler.step()
    assert scheduler.ready
    staged._stages[1].dead = True
    for _ in range(10):
        scheduler.step()
    assert all("stage 2 of the model is lost" in str(listener.error) for listener in listeners)
    assert not scheduler.ready
    scheduler.stop()
