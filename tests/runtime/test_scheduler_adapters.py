"""Requests with different adapters on one scheduler: whatever happens, no token of one adapter serves another."""

import random

import numpy as np
import pytest
from history_session import VOCAB, HistorySession

from glm4_runtime.errors import BusyError, RequestError, StoppedError
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Failed, Generated, Request, Scheduler

ADAPTERS = (None, "a", "b", "c")
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


class AdaptedSession(HistorySession):
    """Keys and values depend on the adapter: its number is added to each token that a row stores."""

    def __init__(self, **options):
        super().__init__(**options)
        self.loaded = ["a", "b", "c"]
        self.mixed = 0  # runs with several adapters

    @property
    def adapters(self):
        return tuple(self.loaded)

    def load_adapter(self, name, _folder):
        self.loaded.append(name)

    def _unload_adapter(self, name):
        self.loaded.remove(name)

    def _run_decoder(self, first_row, ids, past, logits_indices):
        slots = [self._slots.slot(row) for row in range(first_row, first_row + len(ids))]
        numbers = [ADAPTERS.index(self.adapter_of(slot)) for slot in slots]
        self.mixed += len(set(numbers)) > 1
        return super()._run_decoder(first_row, ids + VOCAB * np.array(numbers)[:, None], past, logits_indices)


@pytest.fixture
def session():
    return AdaptedSession(slots=3)


def alone(prompt, adapter):
    session = AdaptedSession(slots=1)
    session.adapter = adapter
    return [token.id for token in session.generate(prompt, GREEDY)]


def submit(scheduler, prompt, adapter, **options):
    """The list into which the events of a request come, and the request's ticket."""
    events = []
    request = Request(tuple(prompt), GREEDY, adapter=adapter, **options)
    return events, scheduler.submit(request, events.append)


def tokens(events):
    assert not [event for event in events if isinstance(event, Failed)], events
    return [event.token.id for event in events if isinstance(event, Generated)]


def run(scheduler):
    for _ in range(1000):
        if not scheduler.step():
            return
    raise AssertionError("the scheduler does not come to rest")


@pytest.mark.parametrize("seed", range(30))
def test_answers_are_those_of_each_adapter_alone(seed):
    """Prompts of a few common beginnings, cancelled, parked and reused."""
    chance = random.Random(seed)
    session = AdaptedSession(slots=chance.choice([1, 2, 3]))
    scheduler = Scheduler(session, step_tokens=chance.choice([8, 40]), max_queue=100)
    beginnings = [[chance.randrange(1, VOCAB) for _ in range(24)] for _ in range(2)]
    asked = []
    for _ in range(40):
        if chance.random() < 0.5:
            prompt = chance.choice(beginnings) + [
                chance.randrange(1, VOCAB) for _ in range(chance.randrange(1, 6))
            ]
            adapter = chance.choice(ADAPTERS)
            events, ticket = submit(scheduler, prompt, adapter)
            asked.append((prompt, adapter, events, ticket))
        if asked and chance.random() < 0.1:
            chance.choice(asked)[3].cancel()
        if asked and chance.random() < 0.2:
            chance.choice(asked)[3].lag()
        if asked and chance.random() < 0.3:
            chance.choice(asked)[3].catch_up()
        scheduler.step()
    for *_, ticket in asked:
        ticket.catch_up()
    run(scheduler)
    for prompt, adapter, events, ticket in asked:
        found, expected = tokens(events), alone(prompt, adapter)
        assert found == expected[: len(found)]
        assert ticket.cancelled or found == expected
    scheduler.stop()


def test_one_step_mixes_adapters(session):
    scheduler = Scheduler(session)
    prompts = [[i, i + 1, i + 2] for i in (1, 2, 3)]
    asked = [
        submit(scheduler, prompt, name)[0] for prompt, name in zip(prompts, ("a", None, "b"), strict=True)
    ]
    run(scheduler)
    assert session.mixed
    for events, prompt, name in zip(asked, prompts, ("a", None, "b"), strict=True):
        assert tokens(events) == alone(prompt, name)
    scheduler.stop()


def test_a_request_continues_elsewhere_with_its_adapter(session):
    scheduler = Scheduler(session)
    expected = alone([5, 6, 7], "b")
    events, _ = submit(scheduler, [5, 6, 7], "b", generated=tuple(expected[:3]))
    run(scheduler)
    assert tokens(events) == expected[3:]
    scheduler.stop()


def test_an_unknown_adapter_is_refused(session):
    scheduler = Scheduler(session)
    with pytest.raises(RequestError, match="no adapter 'z' is loaded"):
        submit(scheduler, [1, 2], "z")
    scheduler.stop()


def test_unloading_waits_for_no_request_and_frees_what_the_cache_keeps(session):
    scheduler = Scheduler(session)
    prompt = list(range(1, 30))
    events, _ = submit(scheduler, prompt, "a")
    scheduler.step()
    with pytest.raises(BusyError, match="1 requests have the adapter 'a'"):
        scheduler.unload_adapter("a")
    run(scheduler)
    assert [slot.owner for slot in scheduler.view().slots].count("cache") == 1
    scheduler.unload_adapter("a")
    assert [slot.owner for slot in scheduler.view().slots].count("cache") == 0
    assert session.adapters == ("b", "c")
    with pytest.raises(RequestError):
        submit(scheduler, prompt, "a")
    assert tokens(events) == alone(prompt, "a")
    scheduler.load_adapter("a", "folder")
    again, _ = submit(scheduler, prompt, "a")
    run(scheduler)
    assert again[0].cached_tokens == 0
    assert tokens(again) == alone(prompt, "a")
    scheduler.stop()


def test_errands_run_on_the_schedulers_thread_and_end_with_it(session):
    scheduler = Scheduler(session)
    scheduler.start()
    scheduler.unload_adapter("c")
    with pytest.raises(RequestError, match="no adapter 'c'"):
        scheduler.unload_adapter("c")
    scheduler.stop()
    with pytest.raises(StoppedError):
        scheduler.load_adapter("c", "folder")
