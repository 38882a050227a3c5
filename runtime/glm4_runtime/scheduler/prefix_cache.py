"""Which slots still hold the beginning of a prompt: kept after their request until the room is needed.

Bookkeeping only; the batch moves the session's slots as a placement says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

# A shorter common beginning (role tokens, mostly) is computed again rather than copied or waited for.
WORTH_SHARING = 16


def shared(one: Ids, other: Ids) -> int:
    """The length of the longest common beginning."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


@dataclass(frozen=True)
class Placement:
    """Where a prompt begins: in ``slot``, with ``length`` positions of ``source`` (the slot itself where equal).

    ``evicts``: the slot holds a kept sequence, which must go first.
    """

    slot: int
    source: int | None = None
    length: int = 0
    evicts: bool = False


class PrefixCache:
    """What each slot that nobody uses still holds, the least recently used first."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._kept: dict[int, Ids] = {}

    def keep(self, slot: int, ids: Ids) -> bool:
        """Remember that the slot holds ``ids``; False where it should be released instead."""
        if self._enabled and len(ids) >= WORTH_SHARING:
            self._kept[slot] = ids
        return slot in self._kept

    def kept(self) -> list[int]:
        """Slots to be evicted, in this order."""
        return list(self._kept)

    def place(self, prompt: Ids, live: Mapping[int, Ids], free: Sequence[int]) -> Placement:
        """Choose a slot for ``prompt`` among the free and the kept ones, and forget what was kept there.

        The last token of the prompt is never reused: its logits are needed. A kept slot goes on itself where
        most of what it holds is used, which is what the next turn of a chat does; else its beginning is
        copied, so that a system prompt stays where it is.
        """
        source, length = self._best(prompt[:-1], live)
        if source in self._kept and 2 * length >= len(self._kept[source]):
            del self._kept[source]
            return Placement(source, source, length)
        if source in self._kept:
            self._kept[source] = self._kept.pop(source)  # used last
        if free:
            return Placement(free[0], source, length)
        slot = next(iter(self._kept))
        del self._kept[slot]
        return Placement(slot, source, length, evicts=slot != source)

    def should_wait(self, prompt: Ids, live: Mapping[int, Ids], coming: Sequence[Ids]) -> bool:
        """Whether one of the prompts that are being taken will soon offer much more than there is now."""
        if not self._enabled or not coming:
            return False
        soon = max(shared(prompt[:-1], other) for other in coming)
        return soon >= WORTH_SHARING and soon >= self._best(prompt[:-1], live)[1] + WORTH_SHARING

    def _best(self, wanted: Ids, live: Mapping[int, Ids]) -> tuple[int | None, int]:
        """The slot that shares most with ``wanted``, and how much; kept slots before live ones."""
        if not self._enabled:
            return None, 0
        lengths = {slot: shared(wanted, ids) for slot, ids in (*self._kept.items(), *live.items())}
        best = max(lengths, key=lengths.__getitem__, default=None)
        if best is None or lengths[best] < WORTH_SHARING:
            return None, 0
        return best, lengths[best]
