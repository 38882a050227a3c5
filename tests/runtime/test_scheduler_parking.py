"""A request whose client does not read gives its slot to a waiting request, and goes on later as if nothing had been."""

import dataclasses
import time

import pytest
from history_session import HistorySession
from scheduling import Counting, Listener, draft_always, drive, require_single_owners, submit

from glm4_runtime import SamplingParams, Session
from glm4_runtime.errors import DeadlineError, StoppedError
from glm4_runtime.scheduler import Request, Scheduler
from glm4_runtime.scheduler.job import Job

PROMPT = tuple(range(2, 42))


def request(tokens=12, prompt=PROMPT, mask=None, **params):
    return Request(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, **params), mask=mask)


def until(scheduler, listener, tokens):
    """Drive steps until a request has so many tokens."""
    end = time.monotonic() + 20
    while len(listener.tokens) < tokens:
        scheduler.step()
        assert time.monotonic() < end


def finished(scheduler, listener):
    end = time.monotonic() + 20
    while not listener.done.is_set():
        scheduler.step()
        assert time.monotonic() < end


@pytest.fixture
def scheduler():
    """Two slots, whose contents are the tokens themselves."""
    return Scheduler(HistorySession(slots=2), max_queue=2, step_tokens=16)


def lagging(scheduler, count=2, tokens=30, first=1):
    """So many requests whose clients read two tokens and no more."""
    asked = [submit(scheduler, request(tokens, (first + number, *PROMPT[:10]))) for number in range(count)]
    for listener, ticket in asked:
        until(scheduler, listener, 2)
        ticket.lag()
    return asked


def test_without_a_waiting_request_nothing_is_parked(scheduler):
    asked = lagging(scheduler)
    drive(scheduler)
    assert [len(listener.tokens) for listener, _ in asked] == [30, 30]
    assert scheduler.stats().preemptions == 0


def test_a_waiting_request_gets_the_slot_of_a_client_that_does_not_read(scheduler):
    (_, idle), (reading, reader) = lagging(scheduler)
    reader.catch_up()
    other, _ = submit(scheduler, request(3))
    scheduler.step()
    assert scheduler.view().parked == (idle,)
    finished(scheduler, other)
    assert not reading.done.is_set()
    assert reader in scheduler.view().running
    stats = scheduler.stats()
    assert (stats.parked, stats.preemptions, stats.recomputed_tokens) == (1, 1, 0)


def test_a_parked_request_stays_parked_until_its_client_reads(scheduler):
    """Although slots are free: else each further request would have its tokens computed again."""
    _, (listener, ticket) = lagging(scheduler)
    for _ in range(3):
        other, _ = submit(scheduler, request(2))
        finished(scheduler, other)
    before = len(listener.tokens)
    drive(scheduler)
    assert len(listener.tokens) == before
    assert scheduler.stats().preemptions == 1
    assert not scheduler.step()
    ticket.catch_up()
    finished(scheduler, listener)
    assert len(listener.tokens) == 30


def test_the_request_with_the_fewest_tokens_is_parked(scheduler):
    asked = lagging(scheduler)
    short, ticket = submit(scheduler, request(30, PROMPT[:3]))
    for _, other in asked:
        other.lag()
    until(scheduler, short, 1)
    ticket.lag()
    submit(scheduler, request(3))
    scheduler.step()
    assert ticket in scheduler.view().parked


def test_a_request_that_has_not_begun_is_not_parked(scheduler):
    """Its client has nothing to read yet."""
    asked = [submit(scheduler, request(4, (number, *PROMPT))) for number in (1, 2)]
    scheduler.step()
    for _, ticket in asked:
        ticket.lag()
    submit(scheduler, request(1))
    scheduler.step()
    assert scheduler.stats().preemptions == 0


@pytest.mark.parametrize("scored", [None, 0])
def test_kept_contents_are_not_computed_again(scheduler, scored):
    """Another slot became free at the same time, so that nobody needed the parked request's tokens to go. A prompt is
    scored once."""
    listener, ticket = submit(scheduler, dataclasses.replace(request(30), prompt_logprobs=scored))
    _, leaves = submit(scheduler, request(30, (3, 4)))
    until(scheduler, listener, 2)
    ticket.lag()
    leaves.cancel()
    other, _ = submit(scheduler, request(3, (9,)))
    scheduler.step()
    assert scheduler.view().parked == (ticket,)
    assert "cache" in [slot.owner for slot in scheduler.view().slots]
    finished(scheduler, other)
    ticket.catch_up()
    finished(scheduler, listener)
    assert len(listener.tokens) == 30
    assert scheduler.stats().recomputed_tokens == 1  # the last one, whose logits are needed


def test_too_many_parked_requests_end_the_one_parked_for_longest(scheduler):
    asked = [pair for first in (1, 3, 5) for pair in lagging(scheduler, first=first)]
    errors = [listener.error for listener, _ in asked]
    assert [type(error) for error in errors] == [DeadlineError] * 2 + [type(None)] * 4
    assert "read a stream as it arrives" in str(errors[0])
    assert len(scheduler.view().parked) == 2
    assert scheduler.stats().requests["timeout"] == 2


def test_clients_that_read_again_at_that_moment_end_no_request(scheduler, monkeypatch):
    """Clients read on other threads, so that a request may be parked that does not lag any more."""
    asked = [pair for first in (1, 3) for pair in lagging(scheduler, first=first)]
    park = Job.park

    def parked_too_late(job):
        park(job)
        for _, ticket in asked:
            ticket.catch_up()

    monkeypatch.setattr(Job, "park", parked_too_late)
    other, _ = submit(scheduler, request(2))
    finished(scheduler, other)
    for listener, _ in asked:
        finished(scheduler, listener)
    assert [listener.error for listener in (*[one for one, _ in asked], other)] == [None] * 5


def test_parked_requests_are_cancelled_end_at_their_deadline_and_with_the_scheduler(scheduler):
    (_, gone), (late, _) = lagging(scheduler)
    for _ in range(2):
        other, _ = submit(scheduler, request(2))
    finished(scheduler, other)
    assert len(scheduler.view().parked) == 2
    gone.cancel()
    scheduler.step()
    assert len(scheduler.view().parked) == 1
    scheduler.stop()
    assert isinstance(late.error, StoppedError)


def test_a_drain_waits_for_a_parked_request():
    scheduler = Scheduler(HistorySession(slots=1))
    scheduler.start()
    done = []

    class Slow(Listener):
        """Does not read from its second token on."""

        def __call__(self, event):
            super().__call__(event)
            if len(self.tokens) == 2 and not done:
                ticket.lag()

    slow, go = Slow(), Listener()
    ticket = scheduler.submit(request(40, (5, 6)), slow)
    scheduler.submit(request(2), go)
    assert go.done.wait(20)
    done.append(True)
    ticket.catch_up()
    scheduler.stop(drain=20)
    assert len(slow.tokens) == 40


def test_a_token_that_may_be_the_last_waits_for_its_mask_after_a_failed_run():
    """The run ahead of the mask fails, the request is parked, and only the mask says that no run was needed."""
    session = HistorySession(slots=1)
    scheduler = Scheduler(session)
    mask = Counting(1, 0.0)
    mask.advance = lambda _token, go=mask.advance: (time.sleep(0.2), go(_token))
    asked = request(9, (5, 6, 7), mask=mask)
    expected = [token.id for token in HistorySession(1).generate(asked.prompt_ids, asked.params, Counting(1))]

    def refuse(histories):
        if any(len(history) > 3 and history[0] == 5 for history in histories):
            raise RuntimeError("the run ahead fails")

    session.before_run = refuse
    listener, ticket = submit(scheduler, asked)
    while not listener.started:
        scheduler.step()
    ticket.lag()
    scheduler.step()
    other, _ = submit(scheduler, request(1, (9, 9)))
    finished(scheduler, other)
    ticket.catch_up()
    finished(scheduler, listener)
    assert (listener.error, listener.ids) == (None, expected)


# What comes out is what comes out alone -------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(demo_quantized):
    with Session.open(demo_quantized["cpu"], threads=1, max_batch_size=1) as opened:
        yield opened


WORDS = tuple(range(300, 340))
KINDS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "seed": 3},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.2, "temperature": 0.7, "seed": 4},
    "bias": {"logit_bias": {7: 2.0}, "min_p": 0.01, "temperature": 1.2, "seed": 5},
    "masked": {"mask": 11, "temperature": 0.8, "seed": 6},
    "scored": {"prompt_logprobs": 2},
}  # fmt: skip


def asked(kind, tokens=12, **options):
    given = KINDS[kind] | options
    mask, scored = given.pop("mask", None), given.pop("prompt_logprobs", None)
    return Request(
        WORDS, SamplingParams(max_tokens=tokens, ignore_eos=True, **given),
        top_logprobs=3, prompt_logprobs=scored, mask=mask and Counting(mask),
    )  # fmt: skip


def answer(session, wanted, parked_after=()):
    """All that the client is told, where it stops to read after so many tokens, each time until another has its turn."""
    scheduler = Scheduler(session, step_tokens=7)
    listener, ticket = submit(scheduler, wanted)
    for tokens in parked_after:
        until(scheduler, listener, tokens)
        ticket.lag()
        other, _ = submit(scheduler, request(2, (5, 6)))
        finished(scheduler, other)
        require_single_owners(scheduler, session)
        ticket.catch_up()
        scheduler.step()
    finished(scheduler, listener)
    stats = scheduler.stats()
    scheduler.stop()
    assert stats.preemptions == len(parked_after)
    scores = listener.started.scores and listener.started.scores.logprobs.tolist()
    return listener.tokens, listener.tops, scores


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_does_not_depend_on_parking(session, kind):
    expected = answer(session, asked(kind))
    assert len(expected[0]) > 9
    for after in ([1], [2, 3], [5, 8], [1, 4, 7]):
        assert answer(session, asked(kind), after) == expected


def test_a_stop_string_is_found_across_a_return(session):
    """Its beginning is held back while the request is parked."""
    text = "".join(token.text for token in answer(session, asked("greedy", 16))[0])
    wanted = asked("greedy", 16, stop=(text[10:22],))
    expected = answer(session, wanted)
    assert "".join(token.text for token in expected[0]) == text[:10]
    for after in range(1, len(expected[0]) - 1):
        assert answer(session, wanted, [after]) == expected


def test_drafts_go_on_after_a_return(session, monkeypatch):
    draft_always(monkeypatch, 4)
    repeated = Request(WORDS[:6] * 4, SamplingParams(max_tokens=30, ignore_eos=True))
    expected = answer(session, repeated)
    assert answer(session, repeated, [3, 12]) == expected
