"""A session of two stages whose cache is the tokens themselves. Runs begin at once and end when somebody waits."""

import dataclasses
from collections import deque
from pathlib import Path

import numpy as np
from history_session import EMPTY, VOCAB, next_logits, small_manifest

from glm4_runtime.bundle import StageInfo
from glm4_runtime.session.stage import Stage
from glm4_runtime.session.staged import StagedSession


class LateRun:
    """A run that has begun; computed after all earlier runs of its stage, when somebody needs it or what follows."""

    def __init__(self, stage, values, step):
        self.stage, self.values, self.step = stage, values, step
        self.error = self.found = None

    def compute(self):
        try:
            given = self.values.result() if isinstance(self.values, LateRun) else self.values
            self.found = self.stage.run(given, self.step)
        except BaseException as error:
            self.error = error

    def result(self):
        while self.found is None and self.error is None:
            self.stage.queue.popleft().compute()
        if self.error is not None:
            raise self.error
        return self.found


class LateStage(Stage):
    overlaps, layers = True, 1

    def __init__(self):
        self.queue = deque()

    def begin(self, values, step):
        self.queue.append(run := LateRun(self, values, step))
        return run

    def catch_up(self):
        while self.queue:
            self.queue.popleft().compute()

    def run(self, values, _step):
        return values

    def _after_runs(self, *_arguments):
        self.catch_up()

    move = clear = resize = write = _after_runs

    def read(self, _row, start, stop):
        self.catch_up()
        return np.zeros((2, 1, stop - start, 1))

    def close(self):
        """Nothing is open."""


class TokenStage(LateStage):
    """The last stage: it has the tokens of all rows.

    Attributes:
        before_run, before_move, before_clear: as in ``HistorySession``.
    """

    def __init__(self, rows):
        super().__init__()
        self.rows = np.full((rows, 0), EMPTY, np.int64)
        self.before_run = self.before_move = self.before_clear = lambda *_: None

    def run(self, values, step):
        histories = []
        for row, (new, length) in enumerate(zip(values, step.past, strict=True), step.first_row):
            self.rows[row, length : length + len(new)] = new
            histories.append(self.rows[row, : length + len(new)].copy())
        self.before_run(histories)
        return np.stack(
            [
                [next_logits(history[: length + index + 1]) for index in indices]
                for history, length, indices in zip(histories, step.past, step.logits_indices, strict=True)
            ]
        )

    def move(self, move):
        self.catch_up()
        self.before_move(move)
        incoming = self.rows[move.source, : move.length].copy()
        self.rows[move.source, : move.swapped_length] = self.rows[move.target, : move.swapped_length]
        self.rows[move.target, : move.length] = incoming

    def clear(self, row):
        self.catch_up()
        self.before_clear(row)
        self.rows[row] = EMPTY

    def resize(self, capacity, used):
        self.catch_up()
        rows = np.full((len(self.rows), capacity), EMPTY, np.int64)
        rows[:, :used] = self.rows[:, :used]
        self.rows = rows


class HistoryStages(StagedSession):
    """As ``HistorySession``, in two stages that overlap."""

    def __init__(self, slots=3, max_seq_len=96, prefill_chunk=6, target="ort"):
        manifest = dataclasses.replace(
            small_manifest(slots, max_seq_len, target),
            stages=(StageInfo(0, 1, "", ""), StageInfo(1, 1, "", "")),
        )
        self.tokens, self.stepping = TokenStage(slots), []
        super().__init__(Path(), manifest, max_seq_len, slots, [LateStage(), self.tokens], "", {})
        self.prefill_chunk = prefill_chunk
        assert manifest.model.vocab_size == VOCAB

    def begin_decode(self, tokens):
        return self.noted(tokens, super().begin_decode)

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
        self.tokens.catch_up()
        return self.tokens.rows[self._slots.row(slot), : self.length(slot)].tolist()

    @property
    def hooked(self):
        """Where hooks are set: see ``HistorySession``."""
        return self.tokens
