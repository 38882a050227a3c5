"""What a caller of the scheduler sees: a request, the events it gives, and the figures of it all."""

from collections.abc import Mapping
from dataclasses import dataclass

from glm4_runtime.errors import Glm4Error
from glm4_runtime.generate import Token
from glm4_runtime.sampling import SamplingParams, TokenMask
from glm4_runtime.scoring import PromptScores

MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    Attributes:
        logprobs: whether tokens carry their log-probability, which reads the whole row of logits once more;
            NaN where not.
        top_logprobs: so many of the likeliest tokens are reported with each, 0 ... 20.
        prompt_logprobs: the log-probability of each token of the prompt is reported, with so many of the likeliest,
            0 ... 20. None where not. Such a prompt is run whole, and reuses nothing.
        generates: whether anything is generated; where not, the request ends with :class:`Started`.
        mask: which tokens may come next; it belongs to this request alone.
        deadline: ``time.monotonic()`` at which the request fails with :class:`DeadlineError`, also while it
            waits in the queue.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    logprobs: bool = True
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    generates: bool = True
    mask: TokenMask | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Started:
    """The whole prompt has been taken; ``cached_tokens`` of it were there already. Comes once, first.

    Attributes:
        scores: of the prompt's tokens, where they were asked for.
    """

    cached_tokens: int
    prompt_tokens: int
    scores: PromptScores | None = None

    @property
    def last(self) -> bool:
        return False


@dataclass(frozen=True)
class Generated:
    """One more token. The last one has a ``finish_reason``.

    Attributes:
        top: the likeliest tokens with their log-probabilities, best first, as many as were asked for.
    """

    token: Token
    top: tuple[tuple[int, float], ...] = ()

    @property
    def last(self) -> bool:
        return self.token.finish_reason is not None


@dataclass(frozen=True)
class Failed:
    """The request ended without an answer; nothing follows."""

    error: Glm4Error

    @property
    def last(self) -> bool:
        return True


Event = Started | Generated | Failed


@dataclass(frozen=True)
class SchedulerStats:
    """Figures at one moment; all but the first three only grow.

    Attributes:
        prompt_tokens: of the prompts taken, those found in the prefix cache (``cached_tokens``) included.
        drafted_tokens: guessed by prompt lookup; ``accepted_tokens`` of them were right.
        requests: how many ended, by outcome: stop, length, cancelled, timeout, failed, stopped.
        steps: rounds of the loop that ran the model; ``step_seconds`` is their time, of which
            ``model_seconds`` within the model.
    """

    queued: int
    active: int
    slots: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    requests: Mapping[str, int]
    steps: int
    step_seconds: float
    model_seconds: float
