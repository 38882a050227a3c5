"""Chooses the replica of a request. Decisions only: no thread, no clock and no Ray."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from glm4_runtime.arrays import Ids
from glm4_runtime.scheduler.prefix_cache import WORTH_SHARING, shared


@dataclass(frozen=True)
class Standing:
    """The load of one replica.

    Attributes:
        slots: requests that it can run together.
        running, waiting: requests that it runs, and requests that wait for it.
    """

    slots: int
    running: int = 0
    waiting: int = 0

    @property
    def requests(self) -> int:
        return self.running + self.waiting

    @property
    def patience(self) -> int:
        """How many requests more than the least busy replica it may have and still be chosen for its prefix."""
        return max(1, self.slots // 2)


class Router:
    """Remembers which token sequences each replica read last, at most one for each slot.

    A request goes to the replica with the longest prefix of its prompt. If this replica has over ``patience`` requests
    more than the least busy one, the request goes to the least busy one.
    """

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[tuple[str | None, bytes], Ids]] = {}

    def choose(
        self,
        prompt_ids: Sequence[int],
        standings: Mapping[str, Standing],
        most_waiting: int | None,
        adapter: str | None = None,
    ) -> str | None:
        """The name of a replica.

        Args:
            most_waiting: replicas with so many waiting requests are not chosen. None: no limit.
            adapter: the request's LoRA adapter. A prefix counts only for the same adapter.

        Returns:
            None if no replica may be chosen.
        """
        free = {
            name: one
            for name, one in standings.items()
            if most_waiting is None or one.waiting < most_waiting or one.running < one.slots
        }
        if not free:
            return None
        idlest = min(free, key=lambda name: free[name].requests / free[name].slots)
        prompt = np.asarray(prompt_ids, np.int64)
        lengths = {name: self.prefix(name, prompt, adapter) for name in free}
        best = max(free, key=lambda name: (lengths[name], -free[name].requests))
        surplus = free[best].requests - free[idlest].requests
        return best if lengths[best] >= WORTH_SHARING and surplus <= free[best].patience else idlest

    def prefix(self, name: str, prompt: Ids, adapter: str | None = None) -> int:
        """Length of the longest prefix of ``prompt`` that a replica has read with this adapter; the last token does not
        count."""
        held = self._held.get(name, OrderedDict())
        return max((shared(prompt[:-1], ids) for key, ids in held.items() if key[0] == adapter), default=0)

    def note(self, name: str, ids: Sequence[int], slots: int, adapter: str | None = None) -> None:
        """Remember that a replica reads these tokens. The sequence that was noted first is forgotten for it."""
        held = self._held.setdefault(name, OrderedDict())
        array = np.asarray(ids, np.int64)
        key = adapter, array.tobytes()
        held[key] = array
        held.move_to_end(key)
        while len(held) > slots:
            held.popitem(last=False)

    def forget(self, name: str) -> None:
        """Forget a replica that is gone."""
        self._held.pop(name, None)
