"""A request that begins with the tokens of an earlier run goes on as if it had not stopped (bit for bit on cpu)."""

import dataclasses
import time

import pytest
from resumable import KINDS, compiler_of, request_of_kind
from scheduling import Listener, drive, submit

from glm4_runtime import SamplingParams, Session
from glm4_runtime.errors import DamagedModelError, RequestError
from glm4_runtime.scheduler import Request, Scheduler, Started


@pytest.fixture(scope="module")
def session(demo_cpu):
    with Session.open(demo_cpu, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def grammars(session):
    return compiler_of(session)


def answer(session, wanted, speculation=True):
    scheduler, listener = Scheduler(session, speculation=speculation), Listener()
    if wanted.generated:
        listener.started = Started(0, 0)  # of the earlier run; a second one would be an error
    scheduler.submit(wanted, listener)
    end = time.monotonic() + 60
    while not listener.done.is_set() and time.monotonic() < end:  # masks are computed on other threads
        drive(scheduler, 10)
    scheduler.stop()
    assert listener.done.is_set()
    assert listener.error is None
    return listener


def facts(listener, start=0):
    return [
        (
            token.id,
            token.text,
            None if token.logprob != token.logprob else token.logprob,
            token.finish_reason,
            top,
        )
        for token, top in zip(listener.tokens, listener.tops, strict=True)
    ][start:]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_is_that_of_the_undisturbed_run(session, grammars, kind):
    whole = answer(session, request_of_kind(kind, session, grammars))
    count = len(whole.tokens)
    assert count > 3
    for done in sorted({1, 2, count // 3, count // 2, count - 1}):
        wanted = request_of_kind(kind, session, grammars)
        generated = tuple(whole.ids[:done])
        if wanted.mask is not None:
            wanted.mask.skip(generated)
        rest = answer(session, dataclasses.replace(wanted, generated=generated), speculation=done % 2 == 0)
        assert facts(rest) == facts(whole, done), (kind, done)


def test_a_request_that_has_ended_cannot_go_on(session):
    scheduler = Scheduler(session)
    ids = session.tokenizer.encode("Once upon a time")
    wanted = Request(tuple(ids), SamplingParams(max_tokens=3), generated=(5, 6, 7))
    with pytest.raises(RequestError, match="3 tokens were generated already, but the request ends after 3"):
        submit(scheduler, wanted)
    scheduler.stop()


def test_nan_is_told_as_a_damaged_model(session, monkeypatch):
    scheduler = Scheduler(session)
    prefill = session.prefill
    monkeypatch.setattr(session, "prefill", lambda *given, **more: prefill(*given, **more) * float("nan"))
    listener, _ = submit(scheduler, Request((1, 2, 3), SamplingParams(max_tokens=3)))
    drive(scheduler)
    scheduler.stop()
    assert isinstance(listener.error, DamagedModelError)
