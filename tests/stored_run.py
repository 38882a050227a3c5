"""A scheduler with a prefix cache on disk, for one process' life in a test. Without torch, so that processes start soon."""

import time
from pathlib import Path

import numpy as np

from glm4_runtime import Session
from glm4_runtime.prefix_store.store import PrefixStore
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Failed, Generated, Scheduler, Started

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def ids(count, seed=0):
    return tuple(np.random.default_rng(seed).integers(4, 300, count).tolist())


class Run:
    """One process' life: a session, a scheduler, and a store in ``folder``."""

    def __init__(self, bundle, folder=None, chunk=512, **options):
        self.session = Session.open(bundle)
        self.session.prefill_chunk = chunk
        self.fed = 0
        prefill = self.session.prefill

        def counted(slot, tokens, logits="last"):
            self.fed += len(tokens)
            return prefill(slot, tokens, logits)

        self.session.prefill = counted
        self.store = None if folder is None else PrefixStore(Path(folder), 10**9, self.session)
        self.scheduler = Scheduler(self.session, store=self.store, speculation=False, **options)
        self.scheduler.start()

    def ask(self, *requests):
        """The token ids of each request; all run together."""
        events = [[] for _ in requests]
        tickets = [
            self.scheduler.submit(one, into.append) for one, into in zip(requests, events, strict=True)
        ]
        wait_for(lambda: all(into and into[-1].last for into in events))
        del tickets
        assert not [event for into in events for event in into if isinstance(event, Failed)]
        self.cached = [event.cached_tokens for into in events for event in into if isinstance(event, Started)]
        return [[event.token.id for event in into if isinstance(event, Generated)] for into in events]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.scheduler.stop()
        self.session.close()


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
