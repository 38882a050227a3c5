"""A session whose cache is the tokens themselves, so that a wrong position of a slot changes what comes next."""

import zlib
from pathlib import Path

import numpy as np

from glm4_runtime.bundle import Limits, Manifest, ModelInfo
from glm4_runtime.session.growing import GrowingSession

VOCAB = 48
EMPTY = -1


def next_logits(history):
    """Logits float32 [VOCAB] that depend on every token of ``history``, and on nothing else. Two times of
    three the third last token is the likeliest: texts repeat themselves now and then."""
    seed = np.uint64(zlib.crc32(np.asarray(history, np.int64).tobytes()))
    mixed = (seed + np.arange(1, VOCAB + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    logits = ((mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**22)).astype(np.float32)
    if seed % np.uint64(3) and len(history) > 2:
        logits[history[-3] % VOCAB] += 5
    return logits


class HistorySession(GrowingSession):
    """Slots, lengths, moves and chunks are the real ones; only the kernels are missing.

    Attributes:
        before_run: called with the histories of a run's rows, each up to its last new token; may raise.
        before_move, before_clear: called before a row is moved or cleared; may raise.
        stepping: the slots of the decode step that is under way.
    """

    def __init__(self, slots=3, max_seq_len=96, prefill_chunk=512, target="cpu"):
        super().__init__(Path(), small_manifest(slots, max_seq_len, target), max_seq_len, slots)
        self.prefill_chunk = prefill_chunk
        self._rows = np.full((slots, 0), EMPTY, np.int64)
        self.before_run = self.before_move = self.before_clear = lambda *_: None
        self.stepping = []

    def decode_block(self, tokens):
        return self.noted(tokens, super().decode_block)

    def run_block(self, tokens):
        return self.noted(tokens, super().run_block)

    def noted(self, tokens, run):
        self.stepping = list(tokens)
        try:
            return run(tokens)
        finally:
            self.stepping = []

    def history(self, slot):
        """The tokens of a slot."""
        return self._rows[self._slots.row(slot), : self.length(slot)].tolist()

    @property
    def hooked(self):
        """Where hooks are set: the session, or its stage that has the tokens."""
        return self

    def _run_decoder(self, first_row, ids, past, logits_indices):
        histories = []
        for row, (new, length) in enumerate(zip(ids, past, strict=True), first_row):
            self._rows[row, length : length + len(new)] = new
            histories.append(self._rows[row, : length + len(new)].copy())
        self.before_run(histories)
        return np.stack(
            [
                [next_logits(history[: length + index + 1]) for index in indices]
                for history, length, indices in zip(histories, past, logits_indices, strict=True)
            ]
        )

    def _run_encoder(self, ids):
        raise NotImplementedError

    def _move_row(self, move):
        self.before_move(move)
        incoming = self._rows[move.source, : move.length].copy()
        self._rows[move.source, : move.swapped_length] = self._rows[move.target, : move.swapped_length]
        self._rows[move.target, : move.length] = incoming

    def _clear_row(self, row):
        self.before_clear(row)
        self._rows[row] = EMPTY

    def _resize_cache(self, capacity):
        rows = np.full((self.max_batch_size, capacity), EMPTY, np.int64)
        used = self._slots.longest()
        rows[:, :used] = self._rows[:, :used]
        self._rows = rows

    def close(self):
        self._rows = np.full((self.max_batch_size, 0), EMPTY, np.int64)


def small_manifest(slots, max_seq_len, target="ort"):
    return Manifest(
        task="causal-lm",
        target=target,
        dialect=target,
        precision="fp32",
        activations="float32",
        kv_cache="float32",
        model=ModelInfo(VOCAB, 8, 1, 1, 1, 8, max_seq_len, eos_token_ids=(0,)),
        limits=Limits(max_seq_len, slots),
        opsets={},
        inputs=(),
        outputs=(),
        providers=(),
        tensor_precisions={},
        tools={},
        config={},
        source_sha256="",
    )
