"""Sampling: a request's parameters, and the sampler that turns logits into a token.

The steps, in order. A step with a neutral parameter is skipped:

    1. logit_bias            added to the logits it names
    2. repetition_penalty    over prompt and output: a positive logit is divided, a negative multiplied
    3. frequency, presence   over the output: minus count x frequency, minus presence
    4. mask                  forbidden tokens are ruled out
    5. temperature           the logits are divided by it; 0 takes the highest one and ends here
    6. top_k                 the k highest
    7. top_p                 the fewest highest whose share of what is left reaches p
    8. min_p                 those with at least min_p times the highest one's probability

If logits are equal, the lower token id ranks higher. So a result never depends on the order of a partition or a sort.

Repetition penalty: Keskar et al., "CTRL", 2019, section 4.1. Frequency and presence: OpenAI's API.
"""

import contextlib
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from glm4_runtime.arrays import FloatArray
from glm4_runtime.errors import NotANumberError, RequestError

# Up to this many scores are sorted directly. A confident model's top_p set is within its highest few hundred.
_FEW = 512


@dataclass(frozen=True)
class SamplingParams:
    """One request's sampling parameters. The defaults decode greedily until the model ends.

    ``stop`` may be a single string. Sequences are kept as tuples. ``max_tokens=None``: as many as fit. Raises
    :class:`RequestError` for a value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name, low, high in _NUMBERS:
            keep(name, _number(name, getattr(self, name), low, high))
        if self.top_p == 0:
            raise RequestError("top_p must be above 0; for the likeliest token alone, set temperature to 0")
        keep("top_k", _integer("top_k", self.top_k, 0, _INT64_MAX, "0 switches it off"))
        if self.seed is not None:
            keep("seed", _integer("seed", self.seed, -_INT64_MAX - 1, _INT64_MAX))
        if self.max_tokens is not None:
            keep("max_tokens", _integer("max_tokens", self.max_tokens, 1, _INT64_MAX))
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be true or false, not {_shown(self.ignore_eos)}")
        keep("logit_bias", _checked_bias(self.logit_bias))
        keep("stop", _checked_stops(self.stop))
        keep("stop_token_ids", _checked_ids("stop_token_ids", self.stop_token_ids))


_INT64_MAX = 2**63 - 1

# Lowest and highest value. Further rules are checked by name above.
_NUMBERS: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, math.inf),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
)


def _shown(value: object) -> str:
    """Any value, short enough for a one-line message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer that no float holds
            number = float(value)
            if math.isfinite(number) and low <= number <= high:
                return number
    span = f"of at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
    raise RequestError(f"{name} must be a finite number {span}, not {_shown(value)}")


def _integer(name: str, value: Any, low: int, high: int, hint: str = "") -> int:
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    span = f"of at least {low}" if high == _INT64_MAX and low >= 0 else f"between {low} and {high}"
    raise RequestError(f"{name} must be an integer {span}{f' ({hint})' if hint else ''}, not {_shown(value)}")


def _checked_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, not be {_shown(bias)}")
    return {
        _integer("a token id in logit_bias", token, 0, _INT64_MAX): _number(
            f"logit_bias of token {token}", value, -100.0, 100.0
        )
        for token, value in bias.items()
    }


def _checked_stops(stops: Any) -> tuple[str, ...]:
    if isinstance(stops, str):
        stops = (stops,)
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise RequestError(f"stop must be a string or a list of strings, not {_shown(stops)}")
    if "" in stops:
        raise RequestError("stop must not hold an empty string: it would end every reply before it begins")
    return tuple(stops)


def _checked_ids(name: str, ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str | bytes | Mapping) or not isinstance(ids, Iterable):
        raise RequestError(f"{name} must be a list of token ids, not {_shown(ids)}")
    return tuple(_integer(f"a token id in {name}", token, 0, _INT64_MAX) for token in ids)


class TokenMask(Protocol):
    """The tokens that may come next in one sequence. Stateful: each sequence needs its own."""

    def advance(self, token: int) -> None:
        """Accept ``token``, and compute which tokens may follow. May run on another thread."""

    def apply(self, logits: FloatArray) -> None:
        """Set the logits [vocab] of forbidden tokens to -inf, in place. Not called while ``advance`` runs."""

    @property
    def finished(self) -> bool:
        """Whether no token may follow; the sequence then ends with "stop"."""


@runtime_checkable
class RevertibleMask(TokenMask, Protocol):
    """A mask that can be copied, and that can return to an earlier state."""

    def copy(self) -> Self:
        """A copy of the state for another sequence. Raises :class:`QueueFullError` if there is too little memory."""

    def skip(self, tokens: Sequence[int]) -> None:
        """Accept tokens, and compute the mask after the last one."""

    def mark(self) -> object:
        """The state now, for :meth:`go_back`."""

    def go_back(self, mark: object) -> None:
        """Forget the tokens after ``mark``."""


@dataclass(frozen=True)
class Sampled:
    """A token and its log-probability under the model itself: softmax of the original logits, before bias, penalties,
    temperature and truncation. So values of different requests can be compared."""

    id: int
    logprob: float


class Sampler:
    """Chooses the tokens of one request, and remembers them for the penalties.

    The random number of the n-th output token depends only on the seed and on n (a Philox counter). It becomes a
    token by inverting the cumulative distribution in the order of token ids. So the same tokens result if a draft is
    verified by sampling at each of its positions, or if a run continues after :meth:`accept`.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
        """Raises :class:`RequestError` if the prompt, ``logit_bias`` or ``stop_token_ids`` contain a token outside
        the vocabulary."""
        prompt = np.asarray(prompt_ids)
        if len(prompt) and prompt.dtype.kind not in "iu":
            raise RequestError(f"the prompt must be a list of token ids, not {_shown(prompt_ids)}")
        prompt = prompt.astype(np.int64)
        for name, ids in (
            ("prompt", prompt),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            _refuse_outside(name, ids, vocab_size)
        self.params = params
        self.vocab_size = vocab_size
        self._seed = (secrets.randbits(64) if params.seed is None else params.seed) % 2**64
        self._step = 0
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        # None if no parameter needs it, so that a long prompt costs nothing.
        self._in_context = _Tally(np.unique(prompt)) if params.repetition_penalty != 1 else None
        self._in_output = _Tally() if params.frequency_penalty or params.presence_penalty else None

    @property
    def takes_the_highest(self) -> bool:
        """Whether, without a mask, the token is always the one with the highest original logit."""
        return self.params.temperature == 0 and self._changes_nothing()

    def sample(self, logits: npt.ArrayLike, mask: TokenMask | None = None) -> Sampled:
        """Like :meth:`choose`, with the token's log-probability."""
        token = self.choose(logits, mask)
        return Sampled(token, logprob(np.asarray(logits, np.float32), token))

    def choose(self, logits: npt.ArrayLike, mask: TokenMask | None = None) -> int:
        """Choose the next token from ``logits`` [vocab], which stay unchanged, and remember it.

        Raises :class:`RequestError` if logits contain NaN or +inf, or only -inf.
        """
        scores = self._penalised(self._checked(logits), mask)
        if self.params.temperature == 0:
            token = int(scores.argmax())
        else:
            ids, weights = self._candidates(scores)
            token = int(ids[_inverse_cdf(weights, self._uniform())])
        self.accept(token)
        return token

    def accept(self, token: int) -> None:
        """Remember a token that was chosen elsewhere (a forced or an already verified one)."""
        if not 0 <= token < self.vocab_size:
            raise RequestError(
                f"token {token} is not in the vocabulary: ids go from 0 to {self.vocab_size - 1}"
            )
        self._step += 1
        for tally in (self._in_context, self._in_output):
            if tally is not None:
                tally.add(token)

    def retract(self, tokens: Sequence[int]) -> None:
        """Forget ``tokens``, which were the last ones, as if they had not been chosen."""
        self._step -= len(tokens)
        for tally in (self._in_context, self._in_output):
            if tally is not None:
                for token in reversed(tokens):
                    tally.remove(token)

    def distribution(self, logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The probabilities [vocab] that :meth:`sample` would draw from. Changes no state."""
        scores = self._penalised(self._checked(logits))
        result = np.zeros(self.vocab_size)
        if self.params.temperature == 0:
            result[scores.argmax()] = 1
        else:
            ids, weights = self._candidates(scores)
            result[ids] = weights / weights.sum()
        return result

    def _checked(self, logits: npt.ArrayLike) -> FloatArray:
        scores = np.asarray(logits, dtype=np.float32)
        if scores.shape != (self.vocab_size,):
            raise ValueError(f"logits have shape {scores.shape}, not ({self.vocab_size},)")
        _refuse_degenerate(scores, NotANumberError)
        return scores

    def _changes_nothing(self) -> bool:
        return not len(self._bias) and self._in_context is None and self._in_output is None

    def _penalised(self, logits: FloatArray, mask: TokenMask | None = None) -> FloatArray:
        """Steps 1 to 4, on a copy if they change anything. The first three read only the tokens they concern."""
        params = self.params
        if mask is None and self._changes_nothing():
            return logits
        scores = logits.copy()
        scores[self._bias_ids] += self._bias
        if self._in_context is not None:
            ids = self._in_context.ids
            seen = scores[ids]
            penalty = np.float32(params.repetition_penalty)
            with np.errstate(over="ignore"):  # refused below
                scores[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._in_output is not None:
            counts = self._in_output.counts
            cut = params.frequency_penalty * counts + params.presence_penalty
            scores[self._in_output.ids] -= cut.astype(np.float32)
        if mask is not None:
            mask.apply(scores)
        _refuse_degenerate(scores)
        return scores

    def _candidates(self, scores: FloatArray) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """Steps 5 to 8: the remaining tokens, in the order of their ids, with unnormalised probabilities (zero for an
        excluded token).

        The likeliest token has weight 1, which min_p compares with.
        """
        params = self.params
        ids = _highest(scores, params.top_k) if 0 < params.top_k < len(scores) else np.arange(len(scores))
        kept = scores[ids] if len(ids) < len(scores) else scores
        with np.errstate(over="ignore", under="ignore"):  # with a tiny temperature the others become -inf
            weights = np.exp((kept.astype(np.float64) - float(kept.max())) / params.temperature)
        if params.top_p < 1:
            nucleus = _nucleus(kept, weights, params.top_p)
            ids, weights = ids[nucleus], weights[nucleus]
        if params.min_p > 0:
            likely = weights >= params.min_p
            ids, weights = ids[likely], weights[likely]
        return ids, weights

    def _uniform(self) -> float:
        """This step's random number in [0, 1), with 53 bits. Only the counter's first word is used, so consecutive
        counters are independent."""
        bits = np.random.Philox(key=self._seed, counter=self._step).random_raw()
        return int(bits >> 11) * 2.0**-53


def _refuse_outside(name: str, ids: Iterable[int], vocab_size: int) -> None:
    found = np.fromiter(ids, np.int64)
    outside = found[(found < 0) | (found >= vocab_size)]
    if len(outside):
        raise RequestError(
            f"{name} names token {outside[0]}, but the vocabulary's ids go from 0 to {vocab_size - 1}"
        )


def _refuse_degenerate(scores: FloatArray, of_nan: type[RequestError] = RequestError) -> None:
    """Raises ``of_nan`` for NaN. The default is for scores after penalties, whose NaN need not be the model's."""
    highest = scores.max()  # NaN if any is NaN
    if np.isnan(highest):
        raise of_nan("the model gave NaN logits: the bundle overflows or is damaged; validate it")
    if highest == np.inf:
        raise RequestError(
            "the model gave an infinite logit: the bundle overflows or is damaged; validate it"
        )
    if highest == -np.inf:
        raise RequestError("every token is ruled out: all logits are -inf")


def logprob(logits: FloatArray, token: int) -> float:
    """The token's log-probability under softmax(logits)."""
    return float(logits[token]) - log_total(logits)


def log_total(logits: FloatArray) -> float:
    """logsumexp of the logits; log-probability = logit - this."""
    highest = logits.max()
    weights = logits - highest
    np.exp(weights, out=weights)
    return float(highest) + math.log(weights.sum(dtype=np.float64))


def likeliest(logits: FloatArray, count: int) -> npt.NDArray[np.intp]:
    """The ``count`` tokens of the highest logits, best first."""
    ids = _highest(logits, count)
    return ids[np.argsort(-logits[ids], kind="stable")]


def _inverse_cdf(weights: npt.NDArray[np.float64], uniform: float) -> int:
    cumulative = weights.cumsum()
    total = cumulative[-1]
    index = cumulative.searchsorted(uniform * total, side="right")
    # uniform * total may round up to total: then take the last token with a weight
    return int(min(index, cumulative.searchsorted(total)))


def _highest(scores: FloatArray, k: int) -> npt.NDArray[np.intp]:
    """Positions of the k highest scores, ascending. Among equal scores, the first ones."""
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > threshold)
    level = np.flatnonzero(scores == threshold)[: k - len(above)]
    return np.sort(np.concatenate((above, level)))


def _nucleus(scores: FloatArray, weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """Positions, ascending, of the smallest set of highest scores whose weights reach top_p of the total.

    Repeatedly splits off the highest part instead of sorting everything, so the cost is linear in the vocabulary.
    """
    missing = top_p * weights.sum()
    inside: list[npt.NDArray[np.intp]] = []
    rest = np.arange(len(scores))
    part = _FEW
    while len(rest) > _FEW:
        highest = _highest(scores[rest], part)
        mass = weights[rest[highest]].sum()
        if mass >= missing:
            rest = rest[highest]
            part = len(rest) // 2
        else:
            missing -= mass
            inside.append(rest[highest])
            rest = np.delete(rest, highest)
            part = min(part * 8, (len(rest) + 1) // 2)
    descending = rest[np.argsort(-scores[rest], kind="stable")]
    reached = weights[descending].cumsum()
    inside.append(descending[: int(reached.searchsorted(missing)) + 1])
    return np.sort(np.concatenate(inside))


class _Tally:
    """Distinct tokens with their counts, as arrays that grow in place; a token costs O(1)."""

    def __init__(self, ids: npt.NDArray[np.int64] | None = None) -> None:
        start = np.empty(0, np.int64) if ids is None else ids
        self._size = len(start)
        self._place = {int(token): place for place, token in enumerate(start)}
        self._ids = np.concatenate((start, np.zeros(64, np.int64)))
        self._counts = np.ones(len(self._ids), np.int64)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: self._size]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, self._size)
        if place < self._size:
            self._counts[place] += 1
            return
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.ones_like(self._counts)))
        self._ids[place], self._counts[place] = token, 1
        self._size += 1

    def remove(self, token: int) -> None:
        """Undo the last :meth:`add`, which was of this token."""
        place = self._place[token]
        self._counts[place] -= 1
        if place == self._size - 1 and not self._counts[place]:
            del self._place[token]
            self._size -= 1
