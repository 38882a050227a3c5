"""The scheduler over a real session: joining, leaving, failing, stopping. Steps are driven by hand where it matters."""

import threading
import time

import numpy as np
import pytest
from scheduling import Listener, draft_always, drive, require_single_owners, submit

from glm4_runtime import RequestError, SamplingParams, Session
from glm4_runtime.errors import DeadlineError, ModelError, QueueFullError, StoppedError
from glm4_runtime.scheduler import Failed, Request, Scheduler, Started, Ticket


def ids(count, seed=0):
    return tuple(np.random.default_rng(seed).integers(4, 300, count).tolist())


def request(count=10, seed=0, tokens=8, **options):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, **options.pop("params", {}))
    return Request(ids(count, seed), params, **options)


@pytest.fixture
def session(tiny_bundles):
    with Session.open(tiny_bundles["ort"], threads=1) as opened:
        yield opened


@pytest.fixture
def scheduler(session):
    return Scheduler(session, step_tokens=32, max_queue=6)


def alone(session, wanted):
    return [token.id for token in session.generate(wanted.prompt_ids, wanted.params, wanted.mask)]


def used_slots(session, scheduler):
    """The slots in use, each of which has one owner."""
    return set(require_single_owners(scheduler, session))


def test_requests_share_steps_and_each_gets_its_own_answer(session, scheduler):
    wanted = [request(5 + 7 * seed, seed, tokens=5 + seed) for seed in range(6)]
    listeners = [submit(scheduler, one)[0] for one in wanted]
    drive(scheduler)
    stats = scheduler.stats()
    scheduler.stop()
    assert [listener.ids for listener in listeners] == [alone(session, one) for one in wanted]
    assert [listener.tokens[-1].finish_reason for listener in listeners] == ["length"] * 6
    assert stats.generated_tokens == sum(5 + seed for seed in range(6))
    assert stats.steps < stats.generated_tokens / 2  # six requests over four slots
    assert stats.requests["length"] == 6
    assert (stats.queued, stats.active, stats.slots) == (0, 0, 4)
    assert 0 < stats.model_seconds < stats.step_seconds


def test_admission_is_in_order_of_arrival(scheduler):
    order = []

    class Noting(Listener):
        def __call__(self, event):
            if self.started is None:
                order.append(self)
            super().__call__(event)

    listeners = [Noting() for _ in range(6)]
    for seed, listener in enumerate(listeners):
        scheduler.submit(request(6, seed, tokens=3 + seed % 2), listener)
    drive(scheduler)
    assert order == listeners


def test_a_long_prompt_does_not_hold_up_the_others(session, scheduler, monkeypatch):
    """While a prompt of 200 is taken, each step of at most 32 tokens also decodes, and a short prompt gets in."""
    widths = []
    real = session._run_decoder

    def note(first_row, token_ids, past, indices):
        widths.append(token_ids.size)
        return real(first_row, token_ids, past, indices)

    monkeypatch.setattr(session, "_run_decoder", note)
    running, _ = submit(scheduler, request(4, 1, tokens=60))
    drive(scheduler, 2)
    long, _ = submit(scheduler, request(200, 2, tokens=1))
    short, _ = submit(scheduler, request(9, 3, tokens=1))
    before = len(running.tokens)
    for step in range(1, 8):
        widths.clear()
        scheduler.step()
        assert sum(widths) <= 32
        assert len(running.tokens) >= before + step  # a draft may give more
        assert short.done.is_set()
    assert long.done.is_set()


def test_a_held_request_generates_nothing_until_it_goes_on(session, scheduler):
    """Its slot stays, the others go on, the thread may sleep, and no token is lost or changed."""
    wanted = request(10, 1, tokens=20)
    held, ticket = submit(scheduler, wanted)
    other, _ = submit(scheduler, request(10, 2, tokens=9))
    drive(scheduler, 3)
    ticket.hold()
    told = len(held.tokens)
    drive(scheduler, 30)
    assert other.done.is_set()
    assert len(held.tokens) == told < 20
    assert scheduler.stats().active == 1
    assert not scheduler.step()  # nothing to do: the thread sleeps
    ticket.go_on()
    drive(scheduler)
    assert held.ids == alone(session, wanted)


def test_a_held_request_ends_at_its_deadline_or_where_it_is_cancelled(scheduler):
    late, ticket = submit(scheduler, request(10, 1, tokens=50, deadline=time.monotonic() + 0.5))
    left, other = submit(scheduler, request(10, 2, tokens=50))
    drive(scheduler, 2)
    ticket.hold()
    other.hold()
    other.cancel()
    time.sleep(0.5)
    drive(scheduler)
    assert isinstance(late.error, DeadlineError)
    assert not left.done.is_set()
    stats = scheduler.stats()
    assert (stats.active, stats.requests["timeout"], stats.requests["cancelled"]) == (0, 1, 1)


def test_cancelling_frees_the_slot_within_one_step(session, scheduler):
    first, ticket = submit(scheduler, request(10, 1, tokens=50))
    others = [submit(scheduler, request(10, seed, tokens=50)) for seed in (2, 3, 4)]
    waiting, _ = submit(scheduler, request(10, 5, tokens=50))
    drive(scheduler, 3)
    told = len(first.tokens)
    assert told
    assert waiting.started is None
    ticket.cancel()
    ticket.cancel()
    scheduler.step()
    assert scheduler.stats().active == 3
    scheduler.step()
    assert waiting.started is not None
    assert len(first.tokens) == told
    assert not first.done.is_set()
    for _, other in others:
        other.cancel()
    drive(scheduler)
    assert scheduler.stats().requests["cancelled"] == 4
    used_slots(session, scheduler)


def test_cancelling_while_queued_or_within_a_prompt(session, scheduler):
    long, ticket = submit(scheduler, request(150, 1))
    scheduler.step()
    assert session.length(0) == 32
    ticket.cancel()
    scheduler.step()
    assert scheduler.stats().active == 0
    again, _ = submit(scheduler, request(150, 1))  # what was taken of the prompt is still good
    drive(scheduler)
    assert again.started.cached_tokens == 32
    assert long.started is None
    queued, ticket = submit(scheduler, request())
    ticket.cancel()
    drive(scheduler)
    assert queued.started is None
    assert scheduler.stats().queued == 0


def test_a_listener_may_cancel_and_a_failing_one_is_cancelled(scheduler):
    tickets = []

    class Once(Listener):
        def __call__(self, event):
            super().__call__(event)
            if self.tokens:
                tickets[0].cancel()

    class Failing(Listener):
        def __call__(self, _event):
            raise RuntimeError("the client's fault")

    once, other = Once(), Listener()
    tickets.append(scheduler.submit(request(10, 1), once))
    scheduler.submit(request(10, 2), Failing())
    scheduler.submit(request(10, 3), other)
    drive(scheduler)
    assert len(once.tokens) == 1
    assert len(other.tokens) == 8
    assert scheduler.stats().requests["cancelled"] == 2


def test_a_listener_hears_of_one_end_and_of_nothing_after_it():
    heard = []
    ticket = Ticket(heard.append, lambda: None)
    events = [Started(0, 3), Failed(ModelError("first")), Failed(ModelError("second")), Started(0, 3)]
    for event in events:
        ticket.tell(event)
    assert heard == events[:2]


def test_a_full_queue_refuses_and_says_when_to_come_back(scheduler):
    tickets = [submit(scheduler, request(seed=seed))[1] for seed in range(6)]
    with pytest.raises(QueueFullError, match="6 requests are waiting") as refused:
        submit(scheduler, request())
    assert refused.value.retry_after >= 1
    tickets[3].cancel()
    scheduler.step()
    submit(scheduler, request())
    drive(scheduler)
    assert scheduler.stats().requests["length"] == 6


def test_deadlines_end_requests_wherever_they_are(scheduler):
    now = time.monotonic()
    late = [submit(scheduler, request(9, seed, tokens=200, deadline=now + 0.05))[0] for seed in range(5)]
    drive(scheduler, 2)
    assert [len(one.tokens) > 0 for one in late] == [True] * 4 + [False]
    time.sleep(0.06)
    drive(scheduler)
    for one in late:
        assert isinstance(one.error, DeadlineError)
    assert scheduler.stats().requests["timeout"] == 5
    intime, _ = submit(scheduler, request(deadline=time.monotonic() + 60))
    drive(scheduler)
    assert intime.error is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": ()}, "empty"),
        ({"prompt_ids": (5, 320)}, "320"),
        ({"prompt_ids": (5,) * 256}, "room for 255"),
        ({"params": SamplingParams(stop="x")}, "tokenizer"),
        ({"params": SamplingParams(logit_bias={999: 1.0})}, "999"),
        ({"top_logprobs": 21}, "between 0 and 20"),
        ({"top_logprobs": 2, "logprobs": False}, "must be 0 without logprobs"),
    ],
)
def test_a_bad_request_is_refused_at_once(scheduler, changes, message):
    options = {"prompt_ids": (5, 6), "params": SamplingParams()} | changes
    with pytest.raises(RequestError, match=message):
        scheduler.submit(Request(**options), Listener())
    assert scheduler.stats().queued == 0


@pytest.mark.parametrize("option", ["step_tokens", "max_queue"])
def test_limits_below_one_are_refused(session, option):
    with pytest.raises(RequestError, match=f"{option} is 0"):
        Scheduler(session, **{option: 0})


def test_a_full_slot_ends_its_request_and_no_other(session, scheduler):
    full, _ = submit(scheduler, request(250, 1, tokens=100))
    other, _ = submit(scheduler, request(10, 2, tokens=40))
    drive(scheduler)
    assert (len(full.tokens), full.tokens[-1].finish_reason) == (6, "length")
    assert len(other.tokens) == 40


def test_log_probabilities_are_those_of_a_single_run(session, scheduler):
    params = {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.5}
    wanted = request(params=params, top_logprobs=5)
    listener, _ = submit(scheduler, wanted)
    silent, _ = submit(scheduler, request(params=params, logprobs=False))
    drive(scheduler)
    scheduler.stop()
    expected = list(session.generate(wanted.prompt_ids, wanted.params))
    assert listener.ids == [token.id for token in expected] == silent.ids
    assert [t.logprob for t in listener.tokens] == pytest.approx([t.logprob for t in expected], abs=1e-4)
    assert np.isnan([token.logprob for token in silent.tokens]).all()
    for token, top in zip(listener.tokens, listener.tops, strict=True):
        values = [value for _, value in top]
        assert len(set(dict(top))) == 5
        assert values == sorted(values, reverse=True)
        assert dict(top).get(token.id, token.logprob) == token.logprob <= values[0]


# Prefixes ---------------------------------------------------------------------------------------


def test_a_repeated_prompt_and_the_next_turn_of_a_chat_are_cached(session, scheduler):
    first, _ = submit(scheduler, request(40, tokens=6))
    drive(scheduler)
    again, _ = submit(scheduler, request(40, tokens=6))
    drive(scheduler)
    turn = Request((*ids(40), *again.ids, 7, 8, 9), SamplingParams(max_tokens=4, ignore_eos=True))
    reply, _ = submit(scheduler, turn)
    drive(scheduler)
    assert (first.started.cached_tokens, again.started.cached_tokens) == (0, 39)
    assert reply.started.cached_tokens == 45  # all but the last token, which no step ever fed
    stats = scheduler.stats()
    assert (stats.cached_tokens, stats.prompt_tokens) == (84, 40 + 40 + 49)
    scheduler.stop()
    assert first.ids == again.ids == alone(session, request(40, tokens=6))
    assert reply.ids == alone(session, turn)


def test_alike_prompts_at_once_are_taken_once(session, scheduler):
    """Four answers to one prompt: the first takes it, in chunks of 32, and the others copy it from there.
    Its last four tokens are not worth another step of waiting."""
    prompt = ids(100)
    wanted = [
        Request(prompt, SamplingParams(max_tokens=5, ignore_eos=True, temperature=1, seed=s))
        for s in range(4)
    ]
    listeners = [submit(scheduler, one)[0] for one in wanted]
    drive(scheduler)
    assert [listener.started.cached_tokens for listener in listeners] == [0, 96, 96, 96]
    scheduler.stop()
    assert [listener.ids for listener in listeners] == [alone(session, one) for one in wanted]


def test_kept_slots_make_room_when_it_is_needed(session, scheduler):
    for seed in range(9):
        listener, _ = submit(scheduler, request(30, seed, tokens=4))
        drive(scheduler)
        assert listener.started.cached_tokens == 0
        assert len(used_slots(session, scheduler)) == min(seed + 1, 4)
    kept, _ = submit(scheduler, request(30, 7, tokens=4))
    lost, _ = submit(scheduler, request(30, 2, tokens=4))
    drive(scheduler)
    assert (kept.started.cached_tokens, lost.started.cached_tokens) == (29, 0)


def test_without_the_cache_every_slot_is_given_back(session):
    scheduler = Scheduler(session, prefix_cache=False)
    listeners = [submit(scheduler, request(40))[0] for _ in range(5)]
    drive(scheduler)
    assert [listener.started.cached_tokens for listener in listeners] == [0] * 5
    assert session.free_slots() == [0, 1, 2, 3]


# Failures ---------------------------------------------------------------------------------------


def poisoned(session, monkeypatch, spoil):
    """Let ``spoil(slots, logits)`` change the logits of every decode step."""
    real = session.decode_block

    def decode_block(tokens):
        slots, logits = real(tokens)
        spoil(slots, logits)
        return slots, logits

    monkeypatch.setattr(session, "decode_block", decode_block)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_logits_fail_their_request_only(session, scheduler, monkeypatch, value):
    def spoil(slots, logits):
        if 1 in slots:
            logits[slots.index(1), 17] = value

    poisoned(session, monkeypatch, spoil)
    listeners = [submit(scheduler, request(20, seed))[0] for seed in range(3)]
    drive(scheduler)
    assert isinstance(listeners[1].error, ModelError)
    assert "logit" in str(listeners[1].error)
    assert [len(listeners[i].tokens) for i in (0, 2)] == [8, 8]
    assert 1 in session.free_slots()  # what failed is not kept for others
    assert scheduler.stats().requests["failed"] == 1
    used_slots(session, scheduler)


def test_a_newcomer_takes_nothing_from_who_fails_in_the_same_step(session, scheduler, monkeypatch):
    """Two prompts that begin alike: the first fails by its logits in the step that lets the second in."""
    first, second = request(40, 1), request(40, 1)
    failing, _ = submit(scheduler, first)
    drive(scheduler, 2)
    assert failing.tokens
    poisoned(
        session,
        monkeypatch,
        lambda slots, logits: logits.__setitem__((0, 17), np.nan) if 0 in slots else None,
    )
    coming, _ = submit(scheduler, second)
    scheduler.step()
    monkeypatch.undo()
    drive(scheduler)
    assert isinstance(failing.error, ModelError)
    assert coming.error is None
    assert len(coming.tokens) == 8


def test_the_memory_of_what_failed_is_zeros_again(session, scheduler, monkeypatch):
    poisoned(session, monkeypatch, lambda _, logits: logits.__setitem__((0, 17), np.nan))
    failing, _ = submit(scheduler, request(20, 1))
    scheduler.step()
    row = session._slots.row(0)
    for array in session._cache.arrays:
        array[row] = np.nan
    drive(scheduler)
    assert isinstance(failing.error, ModelError)
    assert all(not array[row].any() for array in session._cache.arrays)


class PanicError(BaseException):
    """What a panic of an extension in Rust is to Python."""


def test_the_thread_outlives_a_panic(session, monkeypatch):
    scheduler = Scheduler(session)
    real = session.prefill

    def prefill(*arguments):
        monkeypatch.setattr(session, "prefill", real)
        raise PanicError("index out of bounds")

    monkeypatch.setattr(session, "prefill", prefill)
    scheduler.start()
    try:
        failing, _ = submit(scheduler, request(20, 1))
        assert failing.done.wait(20)
        assert isinstance(failing.error, ModelError)
        after, _ = submit(scheduler, request(20, 2))
        assert after.done.wait(20)
        assert len(after.tokens) == 8
    finally:
        scheduler.stop()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("kernel\nwith a long story")])
def test_a_failing_step_fails_those_that_cause_it(session, scheduler, monkeypatch, error):
    """A run that has slot 2 in it fails; the others go on in runs of their own, and later together."""
    real, sizes = session.decode_block, []

    def decode_block(tokens):
        if 2 in tokens:
            raise error
        sizes.append(len(tokens))
        return real(tokens)

    monkeypatch.setattr(session, "decode_block", decode_block)
    wanted = [request(20, seed) for seed in range(4)]
    listeners = [submit(scheduler, one)[0] for one in wanted]
    drive(scheduler)
    assert isinstance(listeners[2].error, ModelError)
    assert "\n" not in str(listeners[2].error)
    assert max(sizes) == 3
    scheduler.stop()
    assert [listeners[i].ids for i in (0, 1, 3)] == [alone(session, wanted[i]) for i in (0, 1, 3)]


def refusing(session, patch, operation):
    """Let a method of the session fail for want of memory."""

    def fail(*arguments, **options):
        raise MemoryError

    patch.setattr(session, operation, fail)


def test_a_prompt_that_cannot_be_taken_fails_alone(session, scheduler, monkeypatch):
    running, _ = submit(scheduler, request(40, 1, tokens=20))
    drive(scheduler, 3)
    with monkeypatch.context() as patch:
        refusing(session, patch, "prefill")
        failing, _ = submit(scheduler, request(40, 1))
        drive(scheduler, 2)
    assert isinstance(failing.error, ModelError)
    after, _ = submit(scheduler, request(40, 3))
    drive(scheduler)
    assert [len(one.tokens) for one in (running, after)] == [20, 8]
    used_slots(session, scheduler)


def test_a_prefix_that_cannot_be_copied_fails_nobody(session, scheduler, monkeypatch):
    running, _ = submit(scheduler, request(40, 1, tokens=20))
    drive(scheduler, 3)
    with monkeypatch.context() as patch:
        refusing(session, patch, "copy_prefix")
        other, _ = submit(scheduler, request(40, 1))
        drive(scheduler)
    assert other.started.cached_tokens == 0
    used_slots(session, scheduler)
    scheduler.stop()
    assert [running.ids, other.ids] == [
        alone(session, request(40, 1, tokens=20)),
        alone(session, request(40, 1)),
    ]


def test_a_draft_that_cannot_be_verified_fails_nobody(session, monkeypatch):
    draft_always(monkeypatch, 4)
    scheduler = Scheduler(session, step_tokens=32, max_queue=6)
    prompt = (*ids(12), *ids(12), *ids(12))
    wanted = Request(prompt, SamplingParams(max_tokens=40, ignore_eos=True))
    listener, _ = submit(scheduler, wanted)
    drive(scheduler, 2)
    tried = []

    def fail(*arguments, **options):
        tried.append(arguments)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(session, "run_block", fail)
        drive(scheduler)
    assert tried
    assert listener.error is None
    scheduler.stop()
    assert listener.ids == alone(session, wanted)


def test_a_defect_in_the_loop_fails_what_is_live_and_frees_all(session, scheduler, monkeypatch):
    listeners = [submit(scheduler, request(20, seed))[0] for seed in range(3)]
    drive(scheduler, 2)
    with monkeypatch.context() as patch:
        patch.setattr("glm4_runtime.scheduler.batch.shares", lambda *_: 1 / 0)
        scheduler.step()
    assert all(isinstance(listener.error, ModelError) for listener in listeners)
    after, _ = submit(scheduler, request(20, 3))
    drive(scheduler)
    assert len(after.tokens) == 8
    used_slots(session, scheduler)


# The thread -------------------------------------------------------------------------------------


def test_stop_drains_and_then_refuses(session):
    before = threading.enumerate()
    scheduler = Scheduler(session)
    scheduler.start()
    listeners = [submit(scheduler, request(20, seed, tokens=30))[0] for seed in range(6)]
    scheduler.stop()
    assert [len(listener.tokens) for listener in listeners] == [30] * 6
    with pytest.raises(StoppedError):
        submit(scheduler, request())
    assert session.free_slots() == [0, 1, 2, 3]
    assert not [one for one in threading.enumerate() if one.name == "scheduler" and one not in before]


@pytest.mark.alone
def test_a_drain_ends_when_its_time_is_over(session, monkeypatch):
    real = session.decode_block

    def slow(tokens):
        time.sleep(0.01)
        return real(tokens)

    monkeypatch.setattr(session, "decode_block", slow)
    scheduler = Scheduler(session)
    scheduler.start()
    listeners = [submit(scheduler, request(20, seed, tokens=230))[0] for seed in range(6)]
    began = time.monotonic()
    scheduler.stop(drain=0.1)
    assert time.monotonic() - began < 1
    assert all(isinstance(listener.error, StoppedError) for listener in listeners)
    assert scheduler.stats().requests["stopped"] == 6
    assert session.free_slots() == [0, 1, 2, 3]


def test_no_event_comes_after_cancel_returns(session):
    scheduler = Scheduler(session, speculation=False)
    scheduler.start()
    for seed in range(20):
        listener, ticket = submit(scheduler, request(5, seed, tokens=240))
        while len(listener.tokens) < 1 + seed:
            time.sleep(0.0005)
        ticket.cancel()
        told = len(listener.tokens)
        time.sleep(0.003)
        assert len(listener.tokens) == told
        assert not listener.done.is_set()
    scheduler.stop()
    assert scheduler.stats().requests["cancelled"] == 20


def test_stopping_what_never_ran(session):
    scheduler = Scheduler(session)
    listener, _ = submit(scheduler, request())
    scheduler.stop()
    assert isinstance(listener.error, StoppedError)


def test_nothing_leaks_over_many_requests_with_aborts(session):
    """Slots and threads exactly; memory by what Python holds, which a leak of one array a request would show."""
    import gc

    scheduler = Scheduler(session, max_queue=1000)
    scheduler.start()
    threads = threading.active_count()

    def load(rounds):
        for round_ in range(rounds):
            pairs = [submit(scheduler, request(10 + i, 100 * round_ + i, tokens=6)) for i in range(16)]
            for _, ticket in pairs[::3]:
                ticket.cancel()
            for listener, ticket in pairs:
                assert ticket.cancelled or listener.done.wait(20)

    load(2)
    gc.collect()
    arrays = sum(type(thing) is np.ndarray for thing in gc.get_objects())
    objects = len(gc.get_objects())
    load(10)
    gc.collect()
    assert threading.active_count() == threads
    assert sum(type(thing) is np.ndarray for thing in gc.get_objects()) <= arrays + 16
    assert len(gc.get_objects()) <= objects + 400
    scheduler.stop()
    assert session.free_slots() == [0, 1, 2, 3]
    stats = scheduler.stats()
    assert sum(stats.requests.values()) == 12 * 16
    assert (stats.queued, stats.active) == (0, 0)
