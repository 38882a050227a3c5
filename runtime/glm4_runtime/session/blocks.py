"""Steps that run several slots at once."""

import abc
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from glm4_runtime.arrays import Ids, Logits
from glm4_runtime.bundle import Manifest
from glm4_runtime.kv_cache import Move
from glm4_runtime.session.checks import require_task, require_tokens
from glm4_runtime.session.positions import SlotPositions

# Dialects whose attention takes several new tokens of several sequences with different lengths. GroupQueryAttention
# (ort) takes one of each, and so do the decode profiles of engines.
WIDE_DIALECTS = ("cpu", "native")


class Blocks(SlotPositions):
    """The part of a session that runs blocks: new tokens of several slots, [slots, width]."""

    manifest: Manifest
    max_batch_size: int

    @property
    def takes_wide_batches(self) -> bool:
        """Whether :meth:`run_block` takes more than one token for each of several slots."""
        return self.manifest.dialect in WIDE_DIALECTS

    def run_block(self, tokens: Mapping[int, Sequence[int]]) -> tuple[list[int], Logits]:
        """Append one or more tokens to each slot in one step. Shorter rows are padded to the longest.

        Returns:
            The slots, and in that order the logits after each token: float32 [slots, width, vocab], which the next run
            may overwrite. Logits beyond a slot's tokens have no meaning.

        Raises:
            SlotError: a slot that is not in use, or that has no room for ``width`` more positions. RequestError: a bad
                token. Neither changes any slot.
        """
        width = max(map(len, tokens.values()))
        slots, past = self._gathered(list(tokens), [token for row in tokens.values() for token in row], width)
        ids = np.array([_padded(tokens[slot], width) for slot in slots], np.int64)
        result = self._run_decoder(0, ids, past, _positions(len(slots), width))
        for slot, length in zip(slots, past, strict=True):
            self._slots.set_length(slot, length + len(tokens[slot]))
        return slots, result

    def _gathered(
        self, slots: list[int], tokens: list[int], width: int, first_row: int = 0
    ) -> tuple[list[int], list[int]]:
        """Check a step of ``width`` positions, and have its slots in consecutive rows from ``first_row`` on.

        Args:
            tokens: all new tokens.

        Returns:
            The slots in the order of their rows, and their lengths.
        """
        require_task(self.manifest, "causal-lm", "decode")
        for slot in slots:
            self._require_slot(slot, in_use=True)
            self._require_room(slot, width)
        require_tokens(tokens, self.manifest.model.vocab_size)
        for move in self._slots.gather(slots, first_row):
            self._move_row(move)
        ordered = self._slots.in_row_order(slots)
        past = [self._slots.length(slot) for slot in ordered]
        self._fit_cache(max(self._slots.needed(), max(past) + width))
        return ordered, past

    @abc.abstractmethod
    def _run_decoder(self, first_row: int, ids: Ids, past: Sequence[int], logits_indices: Ids) -> Logits:
        """Run ids [n, S] on rows first_row ... first_row + n - 1; returns logits [n, positions, vocab].

        The result may be overwritten by the next run.
        """

    @abc.abstractmethod
    def _move_row(self, move: Move) -> None:
        """Copy or swap rows of every layer's cache."""

    @abc.abstractmethod
    def _require_room(self, slot: int, count: int) -> None: ...


def _padded(tokens: Sequence[int], width: int) -> Iterable[int]:
    """The tokens, and the last one again. Padding is a wrong guess: what it writes lies beyond the slot's end."""
    return (*tokens, *(tokens[-1],) * (width - len(tokens)))


def _positions(count: int, width: int) -> Ids:
    return np.tile(np.arange(width), (count, 1))
