"""The prefix cache on disk for one sequence alone, without a scheduler."""

from collections.abc import Sequence

import numpy as np

from glm4_runtime.arrays import Logits
from glm4_runtime.prefix_store.chain import Chain
from glm4_runtime.prefix_store.limits import LEAST_TOKENS
from glm4_runtime.prefix_store.piece import TOKENS
from glm4_runtime.prefix_store.store import PrefixStore
from glm4_runtime.session.base import Session


def prefill(session: Session, store: PrefixStore | None, slot: int, ids: Sequence[int]) -> tuple[Logits, int]:
    """Run a prompt whose first tokens the slot may hold already, and store the prompt.

    Returns:
        Logits of the last position, float32 [vocab], and the number of tokens that were not computed.
    """
    if store is None or len(ids) < TOKENS:
        held = session.length(slot)
        return session.prefill(slot, ids[held:])[0], held
    chain = store.chain(np.asarray(ids, np.int64), session.adapter_of(slot), "")
    present = store.present(chain)
    _restore(session, store, slot, chain, min(present * TOKENS, len(ids) - 1))
    held = session.length(slot)
    logits: Logits = session.prefill(slot, ids[held:])[0]
    if len(ids) >= LEAST_TOKENS and np.isfinite(logits).all():
        _save(session, store, slot, chain)
    return logits, held


def _restore(session: Session, store: PrefixStore, slot: int, chain: Chain, usable: int) -> None:
    """Append pieces up to ``usable`` tokens, or up to the first one that cannot be read."""
    pieces = range(session.length(slot) // TOKENS, -(-usable // TOKENS))
    reading = store.reading(chain, pieces, lambda: None)
    try:
        while (held := session.length(slot)) < usable and (block := reading.take()) is not None:
            start = held % TOKENS
            session.append_positions(slot, block[:, :, start : start + usable - held], usable + 1)
    finally:
        reading.close()


def _save(session: Session, store: PrefixStore, slot: int, chain: Chain) -> None:
    for index in range(len(chain.names)):
        if store.busy:
            store.flush()
        if store.wants(chain, index):
            store.save(chain, index, session.read_positions(slot, index * TOKENS, (index + 1) * TOKENS))
