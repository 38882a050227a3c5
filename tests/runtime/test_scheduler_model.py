"""Random interleavings of all that may happen to requests: each slot has one owner, each request one end, and each
answer is that of a request alone."""

import collections
import random
import time
import types
from concurrent.futures import Future
from typing import ClassVar

import numpy as np
import pytest
from history_session import VOCAB, HistorySession
from history_stages import HistoryStages
from scheduling import Listener, draft_always, require_single_owners

from glm4_runtime import SamplingParams
from glm4_runtime.errors import DeadlineError, Glm4Error, ModelError, QueueFullError, StoppedError
from glm4_runtime.scheduler import Request, Scheduler
from glm4_runtime.scheduler.figures import OUTCOMES

SLOTS, QUEUE = 3, 6
POISON = VOCAB - 1  # whatever holds this token cannot be run
TEXTS = np.random.default_rng(7).integers(1, POISON, (4, 44)).tolist()


class PanicError(BaseException):
    """What a panic of an extension in Rust is to Python."""


class Mask:
    """Allows a quarter of the tokens, each time another; finished after so many tokens."""

    def __init__(self, tokens, fails_at):
        self.tokens, self.fails_at = tokens, fails_at
        self.seen = 0

    def advance(self, _token):
        if self.seen == self.fails_at:
            raise PanicError("a grammar that cannot go on")
        self.seen += 1

    def apply(self, logits):
        logits[np.arange(len(logits)) % 4 != self.seen % 4] = -np.inf

    @property
    def finished(self):
        return self.seen >= self.tokens


class ByHand:
    """Masks are worked out at once, or when the test says so."""

    def __init__(self):
        self.at_once, self.waiting = True, []

    def submit(self, work, *arguments):
        future = Future()
        self.waiting.append((future, work, arguments))
        if self.at_once:
            self.finish(-1)
        return future

    def finish(self, index):
        future, work, arguments = self.waiting.pop(index)
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    def shutdown(self, **_options):
        """As an executor's."""


def refuse_poison(histories):
    if any(POISON in history for history in histories):
        raise ModelError("a poisoned sequence")


def alone(prompt, params, mask):
    """The tokens of a request that has the session to itself, and whether it fails after them."""
    session, tokens = HistorySession(slots=1), []
    session.before_run = refuse_poison
    try:
        tokens.extend(token.id for token in session.generate(prompt, params, mask))
    except (PanicError, Glm4Error):
        return tokens, True
    return tokens, False


class Sibling(HistorySession):
    """A draft model that is often right, and fails in the end."""

    def __init__(self, chance):
        target = chance.choice(("cpu", "ort"))
        super().__init__(SLOTS + chance.choice((-1, 0)), max_seq_len=chance.choice((60, 96)), target=target)
        self.runs_left = chance.choice((5, 1000, 1000))

    def _run_decoder(self, first_row, ids, past, logits_indices):
        self.runs_left -= 1
        if not self.runs_left:
            raise MemoryError
        logits = super()._run_decoder(first_row, ids, past, logits_indices)
        logits[:, :, 5] += 3
        return logits


class Asked:
    """One request of the test, and what it must come to."""

    def __init__(self, prompt, params, mask, deadline, prompt_logprobs):
        self.expected, self.fails = alone(prompt, params, mask and Mask(*mask))
        self.request = Request(
            prompt, params, mask=mask and Mask(*mask), deadline=deadline, prompt_logprobs=prompt_logprobs
        )
        self.listener, self.ticket = Listener(), None
        self.given_up = self.stopped_reading = False

    @property
    def tokens(self):
        return [*self.request.prompt_ids, *self.listener.ids]

    @property
    def over(self):
        return self.ticket.cancelled or self.listener.done.is_set()


class Interleaving:
    """A scheduler over three slots, to which things happen in an order that the seed gives.

    Attributes:
        armed: the next error of a run, of a move and of a clearing.
        blamed: histories of sequences that ran alone when such an error came.
    """

    # how often each thing happens
    WEIGHTS: ClassVar = {
        "submit": 8,
        "step": 16,
        "pace_masks": 1,
        "finish_a_mask": 6,
        "cancel": 1,
        "stop_reading": 4,
        "read_again": 3,
        "wait": 1,
        "fail_next": 1,
        "stop": 0.1,
    }

    def __init__(self, seed, masks, kind):
        self.random, self.masks = random.Random(seed), masks
        self.now, self.stopped = 0.0, False
        self.session = kind(SLOTS, target=self.random.choice(("cpu", "cpu", "ort")))
        hooked = self.session.hooked
        hooked.before_run, hooked.before_move = self.before_run, self.before_move
        hooked.before_clear = lambda _row: self.fail_if_armed("clear", [])
        self.scheduler = Scheduler(
            self.session,
            step_tokens=self.random.choice((8, 16, 64)),
            max_queue=QUEUE,
            prefix_cache=self.random.random() < 0.8,
            speculation=self.random.random() < 0.8,
            draft=self.random.choice((None, Sibling(self.random))),
        )
        self.armed, self.blamed, self.asked = {}, [], []
        # in some runs requests come one by one, so that drafts are made; in others they fill the queue
        self.weights = self.WEIGHTS | {"submit": self.random.choice((2, 8, 16))}

    def run(self, count):
        for name in self.random.choices(list(self.weights), list(self.weights.values()), k=count):
            getattr(self, name)()
            self.holds()
        self.end()

    # What may happen ------------------------------------------------------------------------------

    def submit(self):
        """A prompt that begins like others, or the next turn of an earlier one."""
        pick = self.random.choice
        start = pick(TEXTS)[: pick((40, 30, 22, 17, 3))]
        if self.asked and self.random.random() < 0.3:
            start = pick(self.asked[-8:]).tokens[:60]
        tail = pick([(), (), (1,), (2, 1), (3, 3, 3, 3, 3), (4, 5, 6, 4, 5, 6), (5, 6, 4)])
        if self.random.random() < 0.03:
            tail = (*tail, POISON)
        params = SamplingParams(
            max_tokens=self.random.randint(1, 20),
            temperature=float(self.random.random() < 0.3),
            seed=self.random.randrange(100),
            ignore_eos=self.random.random() < 0.5,
        )
        mask = pick([None, None, None, None, (9, None), (4, None), (3, None), (1, None), (9, 0), (9, 3)])
        deadline = self.now + 3 if self.random.random() < 0.2 else None
        asked = Asked((*start, *tail), params, mask, deadline, pick([None] * 9 + [0]))
        try:
            asked.ticket = self.scheduler.submit(asked.request, asked.listener)
        except QueueFullError:
            assert self.scheduler.stats().queued == QUEUE
        except StoppedError:
            assert self.stopped
        else:
            self.asked.append(asked)

    def step(self):
        self.scheduler.step()

    def pace_masks(self):
        self.masks.at_once = not self.masks.at_once

    def finish_a_mask(self):
        if self.masks.waiting:
            self.masks.finish(self.random.randrange(len(self.masks.waiting)))

    def cancel(self):
        if self.asked:
            asked = self.random.choice(self.asked[-8:])
            asked.given_up = True
            asked.ticket.cancel()

    def stop_reading(self):
        if self.asked:
            asked = self.random.choice(self.asked[-8:])
            asked.stopped_reading = True
            asked.ticket.lag()

    def read_again(self):
        lagging = [asked for asked in self.asked if asked.ticket.lagging]
        if lagging:
            self.random.choice(lagging).ticket.catch_up()

    def wait(self):
        self.now += 1.0

    def fail_next(self):
        where = self.random.choice(("run", "run", "move", "clear"))
        self.armed[where] = self.random.choice((RuntimeError, MemoryError, PanicError))

    def stop(self):
        self.stopped = True
        self.scheduler.stop()

    # What must hold -------------------------------------------------------------------------------

    def holds(self):
        self.check_slots()
        self.check_places()
        for asked in self.asked:
            assert asked.ticket.cancelled == asked.given_up, "the listener found events out of order"
            assert asked.listener.ids == asked.expected[: len(asked.listener.ids)]
            if asked.listener.done.is_set():
                self.check_end(asked)

    def check_slots(self):
        for slot, held in require_single_owners(self.scheduler, self.session).items():
            assert self.session.history(slot)[: len(held)] == held

    def check_places(self):
        """A request waits, runs, is parked, or has ended and been counted: one of them, and once."""
        view = self.scheduler.view()
        places = [*view.waiting, *view.running, *view.parked]
        assert len(view.running) <= SLOTS
        assert len(view.parked) <= QUEUE
        assert len(set(map(id, places))) == len(places)
        open_ = [asked.ticket for asked in self.asked if not asked.over]
        assert all(ticket in places for ticket in open_)
        assert all(ticket in open_ or ticket.cancelled for ticket in places)
        counted = sum(self.scheduler.stats().requests.values())
        assert counted == len(self.asked) - len(places)

    def check_end(self, asked):
        error, told = asked.listener.error, asked.listener.ids
        if error is None:
            assert (told, False) == (asked.expected, asked.fails)
        elif isinstance(error, StoppedError):
            assert self.stopped
        elif isinstance(error, DeadlineError):
            unread = "not read" in str(error)
            assert asked.stopped_reading if unread else self.now >= asked.request.deadline
        elif not self.is_to_blame(asked):
            assert (told, True) == (asked.expected, asked.fails)

    def is_to_blame(self, asked):
        """Whether a run of its sequence alone broke off."""
        return any(
            all(a == b for a, b in zip(history, asked.tokens, strict=False)) for history in self.blamed
        )

    # How it is done -------------------------------------------------------------------------------

    def before_run(self, histories):
        refuse_poison(histories)
        self.fail_if_armed("run", [history.tolist() for history in histories])

    def before_move(self, _move):
        """For a step, whose only sequence is to blame; or for a prefix, which is computed instead."""
        self.fail_if_armed("move", [self.session.history(slot) for slot in self.session.stepping])

    def fail_if_armed(self, where, histories):
        error = self.armed.pop(where, None)
        if error is not None:
            if len(histories) == 1:
                self.blamed += histories
            raise error(where)

    def end(self):
        """Everything comes to an end, whatever has happened."""
        self.armed.clear()
        for asked in self.asked:
            asked.ticket.catch_up()
        for _ in range(600):
            while self.masks.waiting:
                self.masks.finish(0)
            self.scheduler.step()
            stats = self.scheduler.stats()
            if not stats.active and not stats.queued and not stats.parked:
                break
        self.holds()
        assert all(asked.over for asked in self.asked)
        self.scheduler.stop()
        assert self.session.free_slots() == list(range(SLOTS))


def interleave(monkeypatch, seeds, count, kind=HistorySession):
    """Each seed in turn; what happened to all requests, by outcome and by figure."""
    total = collections.Counter()
    draft_always(monkeypatch, 4)
    for seed in seeds:
        masks = ByHand()
        monkeypatch.setattr("glm4_runtime.scheduler.batch.ThreadPoolExecutor", lambda *_, masks=masks: masks)
        one = Interleaving(seed, masks, kind)
        clock = types.SimpleNamespace(monotonic=lambda one=one: one.now, perf_counter=time.perf_counter)
        for name in ("batch", "scheduler", "job"):
            monkeypatch.setattr(f"glm4_runtime.scheduler.{name}.time", clock)
        try:
            one.run(count)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        stats = one.scheduler.stats()
        total.update(stats.requests)
        total.update(
            cached=stats.cached_tokens,
            accepted=stats.accepted_tokens,
            preempted=stats.preemptions,
            recomputed=stats.recomputed_tokens,
        )
    return total


def test_whatever_happens_each_slot_has_one_owner_and_each_request_its_own_answer(monkeypatch):
    total = interleave(monkeypatch, range(60), 300)
    few = {
        name: total[name]
        for name in (*OUTCOMES, "cached", "accepted", "preempted", "recomputed")
        if total[name] < 30
    }
    assert not few, "too few of these for the test to mean something"


class AnyGroups:
    """One or two groups, by chance: every change of their number must be safe."""

    def __init__(self, _most):
        self.random = random.Random(1)

    def groups(self, requests):
        return self.random.choice((1, 2, 2, 2)) if requests > 1 else 1

    def measured(self, *_measurement):
        """Ignored."""


def test_whatever_happens_in_stages_that_overlap(monkeypatch):
    monkeypatch.setattr("glm4_runtime.scheduler.flights.Grouping", AnyGroups)
    total = interleave(monkeypatch, range(60), 300, HistoryStages)
    few = {name: total[name] for name in (*OUTCOMES, "cached", "preempted", "recomputed") if total[name] < 30}
    assert not few, "too few of these for the test to mean something"


@pytest.mark.more
@pytest.mark.parametrize("kind", [HistorySession, HistoryStages])
def test_whatever_happens_at_length(monkeypatch, kind):
    interleave(monkeypatch, range(1000, 4000), 300, kind)
