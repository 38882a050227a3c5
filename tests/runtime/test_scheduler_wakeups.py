"""The scheduler's thread sleeps where it has nothing to do: whatever changes, and whenever, wakes it up."""

import sys
import threading
import time

import pytest
from history_session import HistorySession
from scheduling import submit

from glm4_runtime import SamplingParams
from glm4_runtime.errors import DeadlineError, StoppedError
from glm4_runtime.scheduler import Request, Scheduler

PATIENCE = 20  # seconds after which a test holds that nothing will happen any more


class SlowMask:
    """Allows everything, and is worked out when the test says so."""

    finished = False

    def __init__(self):
        self.go = threading.Event()

    def advance(self, _token):
        self.go.wait(PATIENCE)

    def apply(self, logits):
        """Everything may come next."""


def request(tokens=2, **options):
    return Request((5, 6, 7), SamplingParams(max_tokens=tokens, ignore_eos=True), **options)


class AtLine:
    """Calls ``act`` on a thread of its own when the scheduler's thread is about to execute its ``line``-th line, and
    lets it go as far as it can meanwhile. Installed by :func:`threading.settrace`.

    Attributes:
        claim: taken by the call, or by who calls it off.
        done, result: when ``act`` has returned, and what.
    """

    def __init__(self, line, act):
        self.line, self.act = line, act
        self.claim, self.done, self.result = threading.Lock(), threading.Event(), None

    def __call__(self, frame, event, _argument):
        ours = "/scheduler/" in frame.f_code.co_filename
        if not ours or threading.current_thread().name != "scheduler":
            return None
        self.line -= event == "line"
        if not self.line and self.claim.acquire(blocking=False):
            threading.Thread(target=self.call, daemon=True).start()
            self.done.wait(0.005)
        return self

    def call(self):
        self.result = self.act()
        self.done.set()


def interrupted(line, act, prepare):
    """Run a scheduler, and ``act`` on it at its thread's ``line``-th line.

    Args:
        prepare: called with the scheduler before it starts; its result is given to ``act`` too.

    Returns:
        What ``act`` returned; None where the thread lay down before it came so far.
    """
    scheduler = Scheduler(HistorySession())
    given = prepare(scheduler)
    trace = AtLine(line, lambda: act(scheduler, given))
    threading.settrace(trace)
    try:
        scheduler.start()
    finally:
        threading.settrace(None)
    while not trace.claim.locked() and not scheduler.asleep:
        time.sleep(0.0005)
    if not trace.claim.acquire(blocking=False):
        assert trace.done.wait(PATIENCE), f"asleep for ever after line {line}"
    scheduler.stop(drain=0)
    return trace.result


def every_line(act, prepare=lambda _scheduler: None, stride=1):
    """Interrupt the thread at each of its lines in turn, or at every ``stride``-th; how many lines there were."""
    line = 1
    while interrupted(line, act, prepare) is not None:
        line += stride
    return line - 1


def stopped(scheduler, _given):
    scheduler.stop()
    return True


def answered(scheduler, _given):
    listener, _ = submit(scheduler, request())
    assert listener.done.wait(PATIENCE)
    return len(listener.tokens) == 2


def test_a_stop_at_any_line_ends_an_idle_thread():
    assert every_line(stopped) > 40


def test_a_stop_at_any_line_ends_a_thread_that_has_a_request():
    """The request is cancelled in its last step, so that nothing but the stop is left to wake the thread."""
    assert every_line(stopped, lambda scheduler: submit(scheduler, request(1))) > 150


def test_a_request_at_any_line_is_answered():
    assert every_line(answered) > 40


def test_a_cancellation_at_any_line_frees_the_slot():
    """Of a request whose mask is never ready: nothing else would wake the thread."""

    def prepare(scheduler):
        mask = SlowMask()
        return mask, submit(scheduler, request(9, mask=mask))[1]

    def act(scheduler, given):
        mask, ticket = given
        ticket.cancel()
        end = time.monotonic() + PATIENCE
        while scheduler.stats().active or scheduler.stats().queued:
            assert time.monotonic() < end
            time.sleep(0.0005)
        mask.go.set()
        return True

    assert every_line(act, prepare) > 200


def test_a_mask_that_is_ready_at_any_line_is_applied():
    def prepare(scheduler):
        mask = SlowMask()
        return mask, submit(scheduler, request(2, mask=mask))[0]

    def act(_scheduler, given):
        mask, listener = given
        mask.go.set()
        assert listener.done.wait(PATIENCE)
        return len(listener.tokens) == 2

    assert every_line(act, prepare) > 200


def test_a_client_that_stops_to_read_at_any_line_gives_its_slot_to_who_waits():
    """Its mask is never ready, so that its own steps do not wake the thread. It reads again after the other's end."""

    def prepare(scheduler):
        masks = [SlowMask() for _ in range(3)]
        return (
            masks,
            [submit(scheduler, request(3, mask=mask)) for mask in masks],
            submit(scheduler, request())[0],
        )

    def act(scheduler, given):
        masks, readers, other = given
        while not readers[0][0].started:  # nothing to read before
            time.sleep(0.0005)
        ticket = readers[0][1]
        ticket.lag()
        assert other.done.wait(PATIENCE)
        ticket.catch_up()
        for mask in masks:
            mask.go.set()
        assert all(listener.done.wait(PATIENCE) for listener, _ in readers)
        return all(len(listener.tokens) == 3 for listener, _ in readers)

    assert every_line(act, prepare, stride=7) > 200


@pytest.mark.parametrize("switch", [0.005, 1e-6])
def test_a_stop_after_the_last_token_returns(switch):
    """At the machine's own pace: 200 stops while clients leave."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(switch)
    try:
        for _ in range(200):
            scheduler = Scheduler(HistorySession())
            scheduler.start()
            listeners = [submit(scheduler, request(tokens))[0] for tokens in (1, 3)]
            submit(scheduler, request(60))[1].cancel()
            assert all(listener.done.wait(PATIENCE) for listener in listeners)
            stop = threading.Thread(target=scheduler.stop, daemon=True)
            stop.start()
            stop.join(PATIENCE)
            assert not stop.is_alive()
    finally:
        sys.setswitchinterval(before)


def test_a_deadline_is_kept_where_nothing_else_happens():
    session = HistorySession()
    scheduler = Scheduler(session)
    scheduler.start()
    mask = SlowMask()
    listener, _ = submit(scheduler, request(9, mask=mask, deadline=time.monotonic() + 0.05))
    assert listener.done.wait(PATIENCE)
    assert isinstance(listener.error, DeadlineError)
    assert session.free_slots() == [0, 1, 2]
    mask.go.set()
    scheduler.stop()


def test_a_thread_without_work_sleeps_until_it_is_woken():
    """No step is taken meanwhile: a thread that looks every few milliseconds keeps a laptop awake."""
    scheduler = Scheduler(HistorySession())
    steps = []
    real = scheduler.step
    scheduler.step = lambda: steps.append(1) or real()
    scheduler.start()
    mask = SlowMask()
    submit(scheduler, request(9, mask=mask, deadline=time.monotonic() + 3600))
    end = time.monotonic() + PATIENCE
    while not mask.go.is_set() and scheduler.stats().steps < 2 and time.monotonic() < end:
        time.sleep(0.001)
    while not scheduler.asleep and time.monotonic() < end:
        time.sleep(0.001)
    before = len(steps)
    time.sleep(0.2)
    assert len(steps) <= before + 1
    mask.go.set()
    scheduler.stop()


def test_the_end_of_a_drain_does_not_wait_for_a_mask():
    session = HistorySession()
    scheduler = Scheduler(session)
    scheduler.start()
    mask = SlowMask()
    listener, _ = submit(scheduler, request(9, mask=mask))
    began = time.monotonic()
    scheduler.stop(drain=0.05)
    assert time.monotonic() - began < PATIENCE / 2
    assert isinstance(listener.error, StoppedError)
    mask.go.set()
