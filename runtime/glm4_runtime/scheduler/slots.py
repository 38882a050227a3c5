"""The slots of a session, and the owner of each."""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt

from glm4_runtime.errors import SlotError
from glm4_runtime.generate import Logits
from glm4_runtime.scheduler.prefix_cache import WORTH_SHARING, Ids, Placement, place, should_wait
from glm4_runtime.session import Session
from glm4_runtime.session.base import Decoding

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Lease:
    """One sequence's right to a slot, from :meth:`Slots.lease` to :meth:`Slots.end`.

    Attributes:
        ids: the sequence's tokens, int64 [capacity]; the sequence appends to the array.
        fed: number of these tokens in the slot.
        cached: number of these tokens that were in the slot when the lease began.
        adapter: the LoRA adapter whose keys and values the slot holds. None: the base model's.
        group: as in the sequence's request.
    """

    slot: int
    ids: Ids
    fed: int = 0
    cached: int = 0
    adapter: str | None = None
    group: str = ""

    @property
    def held(self) -> Ids:
        """The tokens in the slot; a view."""
        return self.ids[: self.fed]


@dataclass(frozen=True, eq=False)
class Kept:
    """The tokens that a slot holds after its sequence ended, for one adapter and one group of requests. A higher
    ``used`` means a later use."""

    held: Ids
    used: int
    adapter: str | None = None
    group: str = ""


@dataclass(frozen=True)
class LeasedStep:
    """A decode step that may still run."""

    by_slot: dict[int, Lease]
    step: Decoding

    def __len__(self) -> int:
        return len(self.by_slot)

    def result(self) -> tuple[list[Lease], Logits]:
        """The leases, and their logits float32 [leases, vocab] in the same order; called once."""
        try:
            slots, logits = self.step.result()
        except BaseException:
            for lease in self.by_slot.values():
                lease.fed -= 1
            raise
        return [self.by_slot[slot] for slot in slots], logits


class Slots:
    """Records the owner of each slot: a sequence, the prefix cache, or nobody.

    The table of owners has one entry per slot, and is the only record. Work on a slot needs its lease. A lease that
    is not in the table raises :class:`SlotError`, and the session is not touched.
    """

    def __init__(self, session: Session, prefix_cache: bool) -> None:
        self._session, self._shares = session, prefix_cache
        self._owners: list[Lease | Kept | None] = [None] * session.max_batch_size
        self._uses = itertools.count()

    @property
    def owners(self) -> Sequence[Lease | Kept | None]:
        """The owner of each slot; None: nobody."""
        return tuple(self._owners)

    def lease(self, ids: Ids, reusable: int, adapter: str | None = None, group: str = "") -> Lease:
        """Give the sequence ``ids`` a slot, and reuse the longest prefix of its first ``reusable`` tokens that a slot
        holds for the same adapter and the same group of requests.

        The caller guarantees fewer leases than slots. If no slot is free, a kept one is evicted.
        """
        kept, free = (
            self._kept(adapter, group),
            [slot for slot, owner in enumerate(self._owners) if owner is None],
        )
        placed = place(ids[:reusable], kept, self._live(adapter, group), free)
        if placed.source in kept:
            self._owners[placed.source] = Kept(kept[placed.source], next(self._uses), adapter, group)
        lease = Lease(placed.slot, ids, placed.length, placed.length, adapter, group)
        self._owners[placed.slot] = lease  # from here on the slot has this owner, even if the session fails
        try:
            self._fill(placed, adapter)
        except BaseException:  # a panic in an extension is no Exception
            logger.exception("the beginning of a prompt could not be reused, so all of it is computed")
            lease.fed = lease.cached = 0
            self._start_empty(placed.slot, adapter)
        return lease

    def should_wait(
        self, prompt: Ids, coming: Iterable[Ids], adapter: str | None = None, group: str = ""
    ) -> bool:
        """Whether the prompts ``coming`` of the same adapter and group will soon offer a much longer prefix of
        ``prompt`` than the slots hold now."""
        there = (*self._kept(adapter, group).values(), *self._live(adapter, group).values())
        return self._shares and should_wait(prompt, there, coming)

    def feed(self, lease: Lease, count: int, logits: Literal["none", "last", "all"] = "last") -> Logits:
        """Run the next ``count`` tokens of a sequence; returns the logits of none, the last or all, float32 [0, 1 or
        count, vocab]."""
        self._require(lease)
        stop = lease.fed + count
        rows = self._session.prefill(lease.slot, lease.ids[lease.fed : stop], logits)
        lease.fed = stop
        return rows

    def restore(self, lease: Lease, block: npt.NDArray[Any], expected: int) -> None:
        """Append keys and values [2 * layers, Hkv, tokens, D] of a sequence's next tokens, which another lease ran.

        Args:
            expected: tokens that the lease will have soon.
        """
        self._require(lease)
        self._session.append_positions(lease.slot, block, expected)
        lease.fed += block.shape[2]
        lease.cached += block.shape[2]

    def read(self, lease: Lease, start: int, stop: int) -> npt.NDArray[Any]:
        """Copy keys and values [2 * layers, Hkv, tokens, D] of some tokens of a sequence."""
        self._require(lease)
        return self._session.read_positions(lease.slot, start, stop)

    def run(self, tokens: Mapping[Lease, Sequence[int]]) -> tuple[list[Lease], Logits]:
        """Run one or more next tokens of each sequence in one step. A failed step changes no slot.

        Does not change ``fed``: the caller adds the number of right tokens to it, and calls :meth:`cut` if some were
        wrong.

        Returns:
            The leases, and in the same order the logits after each token: float32 [leases, most tokens, vocab], which
            the next run may overwrite. Rows beyond a sequence's tokens have no meaning.
        """
        for lease in tokens:
            self._require(lease)
        by_slot = {lease.slot: lease for lease in tokens}
        slots, logits = self._run({slot: tokens[lease] for slot, lease in by_slot.items()})
        return [by_slot[slot] for slot in slots], logits

    def begin_decode(self, leases: Sequence[Lease]) -> "LeasedStep":
        """Run the next token of each sequence in one step that may not have ended yet. ``fed`` counts the tokens at
        once. A failed step changes no slot."""
        for lease in leases:
            self._require(lease)
        by_slot = {lease.slot: lease for lease in leases}
        step = self._session.begin_decode(
            {slot: int(lease.ids[lease.fed]) for slot, lease in by_slot.items()}
        )
        for lease in leases:
            lease.fed += 1
        return LeasedStep(by_slot, step)

    def cut(self, lease: Lease) -> None:
        """Truncate the slot to ``fed`` tokens."""
        self._require(lease)
        self._session.truncate(lease.slot, lease.fed)

    def end(self, lease: Lease, *, keep: bool) -> None:
        """End the lease. With ``keep``, the slot's contents stay cached for other prompts; otherwise its memory is
        zeroed."""
        self._require(lease)
        self._owners[lease.slot] = None
        if not keep:
            self._empty(lease.slot)
        elif self._shares and lease.fed >= WORTH_SHARING:
            try:
                self._session.truncate(lease.slot, lease.fed)
            except BaseException:  # a run that nobody has waited for had failed
                self._empty(lease.slot)
                raise
            self._owners[lease.slot] = Kept(lease.held.copy(), next(self._uses), lease.adapter, lease.group)
        else:
            self._session.release(lease.slot)

    def forget(self, adapter: str) -> None:
        """Free the slots that hold tokens of an adapter for other prompts."""
        for slot, owner in enumerate(self._owners):
            if isinstance(owner, Kept) and owner.adapter == adapter:
                self._owners[slot] = None
                self._session.release(slot)

    def close(self) -> None:
        """End all leases and free all slots."""
        for slot, owner in enumerate(self._owners):
            self._owners[slot] = None
            if isinstance(owner, Lease):
                self._empty(slot)
            else:
                self._session.release(slot)

    def _require(self, lease: Lease) -> None:
        if self._owners[lease.slot] is not lease:
            raise SlotError(f"slot {lease.slot} belongs to another sequence by now")

    def _run(self, tokens: Mapping[int, Sequence[int]]) -> tuple[list[int], Logits]:
        if any(len(row) > 1 for row in tokens.values()):
            return self._session.run_block(tokens)
        slots, logits = self._session.decode_block({slot: row[0] for slot, row in tokens.items()})
        return slots, logits[:, None]

    def _kept(self, adapter: str | None, group: str) -> dict[int, Ids]:
        """The contents of kept slots, least recently used first. A slot of another adapter or group has nothing to
        share."""
        kept = [(slot, owner) for slot, owner in enumerate(self._owners) if isinstance(owner, Kept)]
        return {
            slot: owner.held if (owner.adapter, owner.group) == (adapter, group) else owner.held[:0]
            for slot, owner in sorted(kept, key=lambda entry: entry[1].used)
        }

    def _live(self, adapter: str | None, group: str) -> dict[int, Ids]:
        """The contents of leased slots of an adapter and a group, if they may be copied."""
        leases = [owner for owner in self._owners if isinstance(owner, Lease)] if self._shares else []
        return {
            lease.slot: lease.held for lease in leases if (lease.adapter, lease.group) == (adapter, group)
        }

    def _fill(self, placed: Placement, adapter: str | None) -> None:
        """Put the prefix into a slot."""
        if placed.source == placed.slot:
            self._session.truncate(placed.slot, placed.length)
            return
        self._session.release(placed.slot)  # drops the kept contents; does nothing for a free slot
        self._session.use_adapter(placed.slot, adapter)
        if placed.source is not None:
            self._session.copy_prefix(placed.source, placed.slot, placed.length)

    def _start_empty(self, slot: int, adapter: str | None) -> None:
        """Zero the memory of a slot for a sequence with this adapter. If this fails, the slot has no owner."""
        self._empty(slot)
        try:
            self._session.use_adapter(slot, adapter)
        except BaseException:
            self._owners[slot] = None
            raise

    def _empty(self, slot: int) -> None:
        """Zero the memory of a slot and free it. Does nothing for an empty slot."""
        try:
            self._session.discard(slot)
        except BaseException:
            logger.exception("the memory of slot %d could not be zeroed", slot)
