"""What tests of the scheduler share: a listener that remembers, and loops driven by hand."""

import threading

from glm4_runtime.scheduler import Failed, Generated, Started
from glm4_runtime.scheduler.drafts import Speculation


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


def draft_always(monkeypatch, count):
    """Schedulers that are made from now on draft so many tokens, whatever drafts cost."""

    class Always(Speculation):
        def __init__(self):
            super().__init__()
            self.decoded(1.0)

        def width(self, _matched, most):
            return min(count, most)

    monkeypatch.setattr("glm4_runtime.scheduler.batch.Speculation", Always)


def submit(scheduler, request):
    listener = Listener()
    return listener, scheduler.submit(request, listener)


def drive(scheduler, steps=10_000):
    """Run the loop on this thread until nothing is left to do, or so many times."""
    for _ in range(steps):
        if not scheduler.step() and not scheduler.stats().active:
            return


def owners(scheduler):
    """What each slot holds by the account of each of its owners: a list of token arrays for each slot."""
    slots = scheduler._batch._slots
    found = {slot: [] for slot in range(scheduler._session.max_batch_size)}
    for job in scheduler._batch:
        if job.lease is not None:
            assert slots._owners[job.lease.slot] is job.lease
            found[job.lease.slot].append(job.ids[: job.fed])
    for slot, ids in slots._kept().items():
        found[slot].append(ids)
    return found
