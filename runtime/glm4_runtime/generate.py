"""Generation for one sequence: prefill the prompt, then sample and decode token by token until an end."""

import math
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

from glm4_runtime.arrays import Logits as Logits
from glm4_runtime.bundle import ModelInfo
from glm4_runtime.errors import RequestError
from glm4_runtime.sampling import Sampler, SamplingParams, TokenMask, likeliest, log_total
from glm4_runtime.stop_strings import StopStrings
from glm4_runtime.tokenizer import TextStream, Tokenizer

FinishReason = Literal["stop", "length"]


class Steps(Protocol):
    """The model, for one sequence. Returned logits [vocab] are valid until the next call."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Run the whole prompt; returns the logits of the next token."""

    def decode(self, token: int) -> Logits:
        """Run one more token; returns the logits of the next token."""

    def room(self) -> int:
        """How many more tokens prefill and decode can run."""


@dataclass(frozen=True)
class Token:
    """One token with the text that it completes. The last one has a ``finish_reason``.

    Text is held back while it is half a character or may begin a stop string. The text of a token can therefore
    include the text of earlier tokens, whose own was empty. ``logprob`` is the model's own, see :class:`Sampled`.
    ``stop`` is the stop string that ended the output.
    """

    id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None = None
    stop: str | None = None


@dataclass(frozen=True)
class Taken:
    """A chosen token with its log-probability and the likeliest tokens, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens.

    Attributes:
        size: number of logits of a position.
        tokenizer: None for a bundle without one, whose texts are empty.
        ends: the end-of-sequence tokens.
    """

    size: int
    tokenizer: Tokenizer | None
    ends: Collection[int]

    @classmethod
    def of(cls, model: ModelInfo, tokenizer: Tokenizer | None) -> Self:
        return cls(model.vocab_size, tokenizer, model.eos_token_ids)


class Continuation:
    """One prompt and its output so far. Chooses tokens, shows text, and decides where the output ends.

    The caller runs the model and passes the logits of each next token to :meth:`take` and :meth:`add`.

    Attributes:
        count, limit: number of output tokens, and its maximum.
        takes_the_highest: whether the next token is always the one with the highest logit.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        vocabulary: Vocabulary,
        room: int,
        *,
        mask: TokenMask | None = None,
        top_logprobs: int | None = 0,
    ) -> None:
        """
        Args:
            room: tokens that fit the model, prompt and output together; the last output token needs no room.
            top_logprobs: how many of the likeliest tokens to report. None: no log-probabilities at all.

        Raises:
            RequestError: the request cannot be served.
        """
        if not len(prompt_ids):
            raise RequestError("the prompt is empty: it needs at least one token")
        if len(prompt_ids) > room:
            raise RequestError(f"the prompt has {len(prompt_ids)} tokens, but there is room for {room}")
        if params.stop and vocabulary.tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer, which this bundle doesn't have: use stop_token_ids"
            )
        if not 0 <= (top_logprobs or 0) <= vocabulary.size:
            raise RequestError(f"top_logprobs is {top_logprobs}, but must be between 0 and {vocabulary.size}")
        self.sampler = Sampler(params, prompt_ids, vocabulary.size)
        self.takes_the_highest = mask is None and self.sampler.takes_the_highest
        self.mask = mask
        self.count = 0
        limit = room + 1 - len(prompt_ids)
        self.limit = limit if params.max_tokens is None else min(limit, params.max_tokens)
        self._top_logprobs = top_logprobs
        self._shown = _Shown(vocabulary.tokenizer, params.stop)
        self._ends = frozenset(params.stop_token_ids) | frozenset(
            () if params.ignore_eos else vocabulary.ends
        )

    def take(self, logits: Logits) -> Taken:
        """Choose the next token from ``logits`` [vocab], which stay unchanged."""
        return self._described(logits, self.sampler.choose(logits, self.mask))

    def accept(self, logits: Logits, token: int) -> Taken:
        """Choose a token that the caller found, as :meth:`take` would: with ``takes_the_highest``, the highest logit."""
        self.sampler.accept(token)
        return self._described(logits, token)

    def _described(self, logits: Logits, token: int) -> Taken:
        if self._top_logprobs is None:
            return Taken(token, math.nan)
        total = log_total(logits)
        tops = likeliest(logits, self._top_logprobs) if self._top_logprobs else ()
        return Taken(
            token, float(logits[token]) - total, tuple((int(top), float(logits[top]) - total) for top in tops)
        )

    def add(self, taken: Taken) -> Token:
        """The token with the text that it completes, and with a ``finish_reason`` if it is the last."""
        self.count += 1
        reason: FinishReason | None = None
        if taken.id in self._ends:
            text, reason = self._shown.finish(), "stop"
        else:
            text = self._shown.push(taken.id)
            if not self._shown.stopped and self.count == self.limit:
                text, reason = text + self._shown.finish(), "length"
            if self._shown.stopped:
                reason = "stop"
        return Token(taken.id, text, taken.logprob, reason, self._shown.stop)

    def repeat(self, tokens: Sequence[int]) -> None:
        """Take the tokens of an earlier run, with which it had not ended. A mask is not changed.

        Raises:
            RequestError: the request ends at or before the last of them.
        """
        for token in tokens:
            self.sampler.accept(token)
            if self.add(Taken(token, math.nan)).finish_reason is not None:
                raise RequestError(
                    f"{len(tokens)} tokens were generated already, but the request ends after {self.count}"
                )

    def ended_by_mask(self, token: Token) -> Token:
        """The token that :meth:`add` returned, as the last one, because the mask allows no further token."""
        return replace(
            token, text=token.text + self._shown.finish(), finish_reason="stop", stop=self._shown.stop
        )


def generate(
    steps: Steps,
    vocabulary: Vocabulary,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    max_len: int,
    mask: TokenMask | None = None,
) -> Generator[Token, None, None]:
    """Yields the tokens after ``prompt_ids``.

    Ends with "stop" at an end token (unless ``params.ignore_eos``), at a stop token, at a stop string, or
    when ``mask`` is finished. End tokens, stop tokens and stop strings do not appear in the text. Ends with "length"
    after ``max_tokens``, at ``max_len`` tokens of prompt and output together, or when there is no room. The model
    runs no step after the last token, or after the iterator is closed. Without a tokenizer all texts are empty.

    Raises :class:`RequestError` before any step if the request cannot be served.
    """
    if len(prompt_ids) >= max_len:
        raise RequestError(
            f"the prompt has {len(prompt_ids)} tokens, which leaves none to generate: the limit is {max_len}"
        )
    room = min(steps.room(), max_len - 1)
    continuation = Continuation(prompt_ids, params, vocabulary, room, mask=mask)
    return _tokens(steps, continuation, prompt_ids)


def _tokens(
    steps: Steps, continuation: Continuation, prompt_ids: Sequence[int]
) -> Generator[Token, None, None]:
    logits = steps.prefill(prompt_ids)
    while True:
        token = continuation.add(continuation.take(logits))
        mask = continuation.mask
        if token.finish_reason is None and mask is not None:
            mask.advance(token.id)
            if mask.finished:
                token = continuation.ended_by_mask(token)
        yield token
        if token.finish_reason is not None:
            return
        logits = steps.decode(token.id)


class _Shown:
    """The visible text of the tokens: whole characters, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._stops = StopStrings(stops)
        self.stopped = False

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found

    def push(self, token: int) -> str:
        if self._stream is None:
            return ""
        text, self.stopped = self._stops.push(self._stream.push(token))
        return text

    def finish(self) -> str:
        """The text that was held back; half a character becomes U+FFFD."""
        if self._stream is None:
            return ""
        text, self.stopped = self._stops.push(self._stream.flush())
        return text + self._stops.flush()
