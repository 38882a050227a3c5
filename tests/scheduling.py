"""What tests of the scheduler share: a listener that remembers, and loops driven by hand."""

import threading
import time

import numpy as np

from glm4_runtime.scheduler import Failed, Generated, Started
from glm4_runtime.scheduler.drafts.drafting import Drafting, Plan


class Listener:
    """Remembers the events of one request, and holds them to their order."""

    def __init__(self):
        self.started = None
        self.tokens = []
        self.tops = []
        self.error = None
        self.done = threading.Event()

    def __call__(self, event):
        assert not self.done.is_set(), f"{event} after the end"
        match event:
            case Started():
                assert self.started is None
                assert not self.tokens
                self.started = event
            case Generated(token, top):
                assert self.started is not None
                self.tokens.append(token)
                self.tops.append(top)
            case Failed(error):
                self.error = error
        if self.error is not None or (self.tokens and self.tokens[-1].finish_reason is not None):
            self.done.set()

    @property
    def ids(self):
        return [token.id for token in self.tokens]

    @property
    def text(self):
        return "".join(token.text for token in self.tokens)


class Counting:
    """Allows the ids 10 ... 19 first, then 20 ... 29 and so on; finished after so many. Notes its thread."""

    def __init__(self, tokens, seconds=0.0, fails_at=None):
        self.tokens, self.seconds, self.fails_at = tokens, seconds, fails_at
        self.seen = []
        self.threads = set()
        self.busy = False

    def advance(self, token):
        self.busy = True
        time.sleep(self.seconds)
        if len(self.seen) == self.fails_at:
            raise ValueError("a grammar that cannot go on")
        self.seen.append(token)
        self.threads.add(threading.current_thread().name)
        self.busy = False

    def apply(self, logits):
        assert not self.busy
        first = 10 + 10 * (len(self.seen) % 20)
        allowed = logits[first : first + 10].copy()
        logits[:] = -np.inf
        logits[first : first + 10] = allowed

    @property
    def finished(self):
        return len(self.seen) >= self.tokens


def draft_always(monkeypatch, count):
    """Schedulers that are made from now on draft so many tokens, whatever drafts cost."""

    class Always(Drafting):
        def _best(self, offers, most):
            first = {job: some[0] for job, some in offers.items() if some}
            return Plan({job: (one, min(count, one.most, most)) for job, one in first.items()}, rate=2.0)

    monkeypatch.setattr("glm4_runtime.scheduler.batch.Drafting", Always)


def submit(scheduler, request):
    listener = Listener()
    return listener, scheduler.submit(request, listener)


def drive(scheduler, steps=10_000):
    """Run the loop on this thread until nothing is left to do, or so many times."""
    for _ in range(steps):
        if not scheduler.step() and not scheduler.stats().active:
            return


def require_single_owners(scheduler, session):
    """Each running request has a slot of its own, and what a slot holds is the account of its owner."""
    view = scheduler.view()
    leased = {ticket: slot for ticket, slot in view.running.items() if slot is not None}
    assert len(set(leased.values())) == len(leased)
    owners = {slot: one.owner for slot, one in enumerate(view.slots)}
    assert leased == {owner: slot for slot, owner in owners.items() if owner not in (None, "cache")}
    holding = {slot: one.tokens.tolist() for slot, one in enumerate(view.slots) if len(one.tokens)}
    assert all(owners[slot] is not None for slot in holding)
    assert set(holding) == set(range(len(view.slots))) - set(session.free_slots())
    for slot, tokens in holding.items():
        # while a mask is being computed, a slot also holds drafted tokens that nobody has judged
        assert session.length(slot) >= len(tokens)
    return holding
