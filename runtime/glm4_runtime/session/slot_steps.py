"""One sequence in one slot of a session, step by step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glm4_runtime.arrays import Logits

if TYPE_CHECKING:
    from glm4_runtime.prefix_store.store import PrefixStore
    from glm4_runtime.session.base import Session


class SlotSteps:
    """One slot of a session as :class:`Steps`; taken at the first step."""

    def __init__(self, session: "Session", store: "PrefixStore | None" = None) -> None:
        self._session, self._store = session, store
        self._slot: int | None = None

    def prefill(self, ids: Sequence[int]) -> Logits:
        from glm4_runtime.prefix_store.single import prefill  # imports sessions

        self._slot = self._session.next_slot()
        return prefill(self._session, self._store, self._slot, ids)[0]

    def decode(self, token: int) -> Logits:
        assert self._slot is not None
        _, logits = self._session.decode_block({self._slot: token})
        row: Logits = logits[0]
        return row

    def room(self) -> int:
        used = 0 if self._slot is None else self._session.length(self._slot)
        return self._session.max_seq_len - used

    def release(self) -> None:
        if self._slot is not None:
            self._session.release(self._slot)

    def discard(self) -> None:
        if self._slot is not None:
            self._session.discard(self._slot)
