"""The scheduler's use of a prefix cache on disk: what a job reads into its slot, and what it copies out for others."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from glm4_runtime.prefix_store.chain import Chain, Reading
from glm4_runtime.prefix_store.limits import LEAST_TOKENS
from glm4_runtime.prefix_store.piece import TOKENS
from glm4_runtime.prefix_store.store import PrefixStore
from glm4_runtime.scheduler.figures import Figures
from glm4_runtime.scheduler.prefix_cache import WORTH_SHARING
from glm4_runtime.scheduler.slots import Lease, Slots

if TYPE_CHECKING:
    from glm4_runtime.scheduler.job import Job

logger = logging.getLogger(__name__)


class StoredPrefix:
    """The pieces of one lease.

    Attributes:
        reading: pieces on their way into the slot. None: the rest is computed.
        saved: number of first pieces that are on the disk or on their way there.
        goal: number of pieces to be stored.
    """

    def __init__(self, chain: Chain, saved: int, goal: int) -> None:
        self.chain, self.saved, self.goal = chain, saved, goal
        self.reading: Reading | None = None
        self.usable = 0  # tokens that may come from the disk

    @property
    def waits(self) -> bool:
        """Whether the next piece is still being read."""
        return self.reading is not None and not self.reading.ready


class StoredPrefixes:
    """Moves pieces between slots and a store. Only the scheduler's thread uses it."""

    def __init__(self, store: PrefixStore, slots: Slots, figures: Figures, wake: Callable[[], None]) -> None:
        self._store, self._slots, self._figures, self._wake = store, slots, figures, wake

    def begin(self, lease: Lease, prompt: int, reusable: int) -> StoredPrefix | None:
        """Look for the beginning of a sequence on the disk, and begin to read what the slot does not hold. An error
        costs only the cache.

        Args:
            prompt: number of tokens that prefill puts into the slot.
            reusable: how many of them may come from a cache, the last one included, which is computed in any case.
        """
        if prompt < TOKENS:
            return None
        try:
            return self._begin(lease, prompt, reusable)
        except Exception:
            logger.exception("a prompt could not be looked up in the prefix cache; the request goes on")
            return None

    def _begin(self, lease: Lease, prompt: int, reusable: int) -> StoredPrefix:
        chain = self._store.chain(lease.ids[:prompt], lease.adapter, lease.group)
        present = self._store.present(chain)
        stored = StoredPrefix(chain, present, len(chain.names) if prompt >= LEAST_TOKENS else 0)
        stored.usable = min(present * TOKENS, reusable - 1)
        if stored.usable >= lease.fed + WORTH_SHARING:
            pieces = range(lease.fed // TOKENS, -(-stored.usable // TOKENS))
            stored.reading = self._store.reading(chain, pieces, self._wake)
        return stored

    def restore(self, lease: Lease, stored: StoredPrefix, most: int) -> None:
        """Put at most ``most`` pieces that were read into the slot."""
        for _ in range(most):
            reading = stored.reading
            if reading is None or not reading.ready:
                return
            block = None if reading.ended else reading.take()
            if block is None:
                stored.reading, stored.saved = None, min(stored.saved, lease.fed // TOKENS)
                return
            start = lease.fed % TOKENS
            stop = min(TOKENS, start + stored.usable - lease.fed)
            self._slots.restore(lease, block[:, :, start:stop], stored.usable + 1)
            self._figures.stored_tokens += stop - start

    def save(self, jobs: "Sequence[Job]", most: int) -> None:
        """Copy at most ``most`` complete pieces of prompts for the disk. An error costs only the pieces."""
        pairs = [(job.lease, job.stored) for job in jobs if job.lease is not None and job.stored is not None]
        try:
            self._save(pairs, most)
        except Exception:
            logger.exception("a prompt could not be copied for the prefix cache; the request goes on")

    def _save(self, leases: Iterable[tuple[Lease, StoredPrefix]], most: int) -> None:
        for lease, stored in leases:
            while stored.reading is None and stored.saved < min(stored.goal, lease.fed // TOKENS):
                if not most or self._store.busy:
                    return
                index, stored.saved = stored.saved, stored.saved + 1
                if self._store.wants(stored.chain, index):
                    block = self._slots.read(lease, index * TOKENS, (index + 1) * TOKENS)
                    self._store.save(stored.chain, index, block)
                    most -= 1


def close(stored: Sequence[StoredPrefix | None]) -> None:
    """Read no more pieces."""
    for one in stored:
        if one is not None and one.reading is not None:
            one.reading.close()
            one.reading = None
