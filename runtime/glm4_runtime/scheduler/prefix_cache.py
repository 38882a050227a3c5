"""Chooses where a prompt starts: in the slot with the longest common prefix, or from a copy of this prefix.

Decisions only. :mod:`slots` knows the contents of the slots and carries the decisions out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from glm4_runtime.arrays import Ids as Ids

# A shorter common prefix (mostly role tokens) is computed again, and neither copied nor waited for.
WORTH_SHARING = 16


def shared(one: Ids, other: Ids) -> int:
    """Length of the longest common prefix."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


@dataclass(frozen=True)
class Placement:
    """A prompt starts in ``slot``, with ``length`` positions of ``source``, which may be the slot itself."""

    slot: int
    source: int | None = None
    length: int = 0


def place(prompt: Ids, kept: Mapping[int, Ids], live: Mapping[int, Ids], free: Sequence[int]) -> Placement:
    """Choose a slot for ``prompt`` among the free and the kept ones.

    The last token of the prompt is never reused, because its logits are needed. If the prompt uses most of a kept
    slot, as the next turn of a chat does, it continues in this slot. Otherwise the prefix is copied, so that a system
    prompt stays in its slot.

    Args:
        kept: contents of unused slots, least recently used first; the first is evicted first.
        live: contents of slots in use: they can be copied, but not taken.
        free: empty slots.
    """
    source, length = _best(prompt, kept, live)
    if source is not None and source in kept and 2 * length >= len(kept[source]):
        return Placement(source, source, length)
    if free:
        return Placement(free[0], source, length)
    others = [slot for slot in kept if slot != source]
    slot = others[0] if others else next(iter(kept))
    return Placement(slot, source, length)


def should_wait(prompt: Ids, there: Iterable[Ids], coming: Iterable[Ids]) -> bool:
    """Whether a prompt that is being read will soon offer a much longer prefix than the slots hold now."""
    now = max((shared(prompt[:-1], ids) for ids in there), default=0)
    soon = max((shared(prompt[:-1], ids) for ids in coming), default=0)
    return soon >= max(WORTH_SHARING, (now if now >= WORTH_SHARING else 0) + WORTH_SHARING)


def _best(prompt: Ids, kept: Mapping[int, Ids], live: Mapping[int, Ids]) -> tuple[int | None, int]:
    """The slot with the longest common prefix, and its length; kept slots before live ones."""
    lengths = {slot: shared(prompt[:-1], ids) for slot, ids in (*kept.items(), *live.items())}
    best = max(lengths, key=lengths.__getitem__, default=None)
    if best is None or lengths[best] < WORTH_SHARING:
        return None, 0
    return best, lengths[best]
