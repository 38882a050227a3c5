"""Where a prompt begins: in the slot that holds most of it already, or from a copy of that slot's beginning.

Decisions only; :mod:`slots` knows what each slot holds, and carries them out.
"""

from collections.abc import Iterable, Mapping, Sequence
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
    """Where a prompt begins: in ``slot``, with ``length`` positions of ``source`` (the slot itself where equal)."""

    slot: int
    source: int | None = None
    length: int = 0


def place(prompt: Ids, kept: Mapping[int, Ids], live: Mapping[int, Ids], free: Sequence[int]) -> Placement:
    """Choose a slot for ``prompt`` among the free and the kept ones.

    The last token of the prompt is never reused: its logits are needed. A kept slot goes on itself where
    most of what it holds is used, which is what the next turn of a chat does; else its beginning is
    copied, so that a system prompt stays where it is.

    Args:
        kept: what each slot holds that nobody uses, the least recently used first: this one is evicted first.
        live: what each slot holds that is in use: it can be copied from, and not taken.
        free: slots that hold nothing.
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
    """Whether one of the prompts that are being taken will soon offer much more than there is now."""
    now = max((shared(prompt[:-1], ids) for ids in there), default=0)
    soon = max((shared(prompt[:-1], ids) for ids in coming), default=0)
    return soon >= max(WORTH_SHARING, (now if now >= WORTH_SHARING else 0) + WORTH_SHARING)


def _best(prompt: Ids, kept: Mapping[int, Ids], live: Mapping[int, Ids]) -> tuple[int | None, int]:
    """The slot that shares most with ``prompt``, and how much; kept slots before live ones."""
    lengths = {slot: shared(prompt[:-1], ids) for slot, ids in (*kept.items(), *live.items())}
    best = max(lengths, key=lengths.__getitem__, default=None)
    if best is None or lengths[best] < WORTH_SHARING:
        return None, 0
    return best, lengths[best]
