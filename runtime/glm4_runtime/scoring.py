"""Log-probabilities of given tokens: of a continuation, a long text, or a prompt.

log p(token) = logit - log(sum(exp(logits))), in float32 with the sum in float64. The logits of a whole text are never
in memory together: with a vocabulary of 151552, one position takes 600 KB.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from glm4_runtime.arrays import FloatArray
from glm4_runtime.errors import RequestError
from glm4_runtime.sampling import likeliest, log_total

if TYPE_CHECKING:
    from glm4_runtime.session.base import Session


# Bytes of logits per run.
_BLOCK_BYTES = 64 * 2**20
_FEWEST_ROWS = 16


def rows_per_run(vocab_size: int, chunk: int) -> int:
    """Number of positions per run."""
    return min(chunk, max(_FEWEST_ROWS, _BLOCK_BYTES // (4 * vocab_size)))


@dataclass(frozen=True)
class LogLikelihood:
    """
    Attributes:
        logprobs: natural logarithm of each token's probability, float64 [tokens].
        greedy: whether each token is the likeliest at its position. Among equal logits, the lowest id counts as the
            likeliest.
    """

    logprobs: npt.NDArray[np.float64]
    greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of all tokens together."""
        return float(self.logprobs.sum())


class PromptScores:
    """The log-probabilities of a prompt's tokens after the first; filled while the prompt runs.

    Attributes:
        logprobs: float64 [tokens - 1].
        ranks: 1 for the likeliest token, int64 [tokens - 1].
        top: the likeliest tokens with their log-probabilities, best first, for each of ``logprobs``.
    """

    def __init__(self, ids: Sequence[int], top: int) -> None:
        """``top``: how many of the likeliest tokens to keep."""
        self._ids = np.asarray(ids, np.int64)
        self._top = top
        self.logprobs = np.full(len(self._ids) - 1, np.nan)
        self.ranks = np.zeros(len(self._ids) - 1, np.int64)
        self.top: list[tuple[tuple[int, float], ...]] = [()] * (len(self._ids) - 1)

    def take(self, start: int, logits: FloatArray) -> None:
        """Record the logits [positions, vocab] from position ``start`` on. Those of the last token are not used."""
        for place, row in enumerate(logits[: len(self._ids) - 1 - start], start):
            token = int(self._ids[place + 1])
            total = _checked_total(row)
            self.logprobs[place] = float(row[token]) - total
            self.ranks[place] = 1 + int((row > row[token]).sum())
            best = _likeliest(row, self._top)
            self.top[place] = tuple((one, float(row[one]) - total) for one in best)


def log_likelihoods(
    session: "Session", prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[LogLikelihood]:
    """Each continuation's log-likelihood after the prompt. The prompt runs once.

    The prompt without its last token always runs alone, so that no result depends on the other continuations.
    """
    if not len(prompt_ids):
        raise RequestError("the prompt is empty: a first token has no probability without one before it")
    for continuation in continuations:
        length = len(prompt_ids) + len(continuation) - 1
        if length > session.max_seq_len:
            raise RequestError(
                f"prompt and continuation have {length + 1} tokens, but at most {session.max_seq_len + 1} can be scored"
            )
    slot = _free_slot(session)
    before = list(prompt_ids[:-1])
    try:
        if before:
            session.prefill(slot, before)
        results = []
        for continuation in continuations:
            results.append(_continued(session, slot, prompt_ids[-1], continuation))
            if session.length(slot):
                session.truncate(slot, len(before))
    except BaseException:
        session.discard(slot)  # its contents may not be finite
        raise
    session.release(slot)
    return results


def rolling_log_likelihood(session: "Session", token_ids: Sequence[int], context: int = 1) -> LogLikelihood:
    """The log-likelihood of all tokens after the first, of a text of any length.

    A long text is cut into windows, and each token is scored once. A window begins with ``context`` tokens of the
    previous one. The last window begins as early as possible.
    """
    if len(token_ids) < 2:
        raise RequestError(f"{len(token_ids)} tokens were given; a log-likelihood needs at least two")
    if not 1 <= context < session.max_seq_len:
        raise RequestError(f"context is {context}, but must be between 1 and {session.max_seq_len - 1}")
    parts = [
        log_likelihoods(session, token_ids[begin:first], [token_ids[first:end]])[0]
        for begin, first, end in windows(len(token_ids), session.max_seq_len, context)
    ]
    return LogLikelihood(
        np.concatenate([part.logprobs for part in parts]), all(part.greedy for part in parts)
    )


def windows(length: int, longest: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Begin, first scored position and end of each window. A window runs at most ``end - begin - 1`` tokens."""
    first = 1
    while first < length:
        end = min(length, first + longest - (0 if first == 1 else context - 1))
        yield max(0, end - 1 - longest), first, end
        first = end


def _continued(session: "Session", slot: int, last: int, continuation: Sequence[int]) -> LogLikelihood:
    ids = [last, *continuation[:-1]] if len(continuation) else []
    step = rows_per_run(session.manifest.model.vocab_size, session.prefill_chunk)
    logprobs: list[float] = []
    greedy = True
    for start in range(0, len(ids), step):
        logits = session.prefill(slot, ids[start : start + step], logits="all")
        for row, token in zip(logits, continuation[start : start + step], strict=True):
            if not 0 <= token < len(row):
                raise RequestError(f"token id {token} is outside the vocabulary 0 ... {len(row) - 1}")
            logprobs.append(float(row[token]) - _checked_total(row))
            greedy = greedy and int(row.argmax()) == token
    return LogLikelihood(np.array(logprobs), greedy)


def _checked_total(row: FloatArray) -> float:
    highest = row.max()
    if not np.isfinite(highest):
        raise RequestError(
            "the model gave logits that are not finite: the bundle overflows or is damaged; validate it"
        )
    return log_total(row)


def _likeliest(row: FloatArray, count: int) -> list[int]:
    if count == 1:
        return [int(row.argmax())]
    return [int(token) for token in likeliest(row, count)] if count else []


def _free_slot(session: "Session") -> int:
    free = session.free_slots()
    if not free:
        raise RequestError(f"all {session.max_batch_size} slots are in use; release one first")
    return free[0]
