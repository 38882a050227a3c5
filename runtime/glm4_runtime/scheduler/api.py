"""The scheduler's interface: requests, events, and statistics."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from glm4_runtime.errors import Glm4Error
from glm4_runtime.generate import Token
from glm4_runtime.sampling import SamplingParams, TokenMask
from glm4_runtime.scoring import PromptScores

MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    Attributes:
        logprobs: whether tokens carry their log-probability (NaN otherwise). This reads the whole row of logits once
            more.
        top_logprobs: how many of the likeliest tokens to report with each token, 0 ... 20.
        prompt_logprobs: how many of the likeliest tokens to report for each prompt token, 0 ... 20, beside its own
            log-probability. None: no report. A reported prompt runs completely and reuses no prefix.
        generates: whether to generate tokens; if not, the request ends with :class:`Started`.
        mask: the allowed next tokens, after ``generated``; it belongs to this request only.
        generated: tokens of an earlier run of this request, which the listener has. Generation goes on after them as if
            it had not stopped; ``params.seed`` must be that of the earlier run. There is no :class:`Started` then.
        deadline: the ``time.monotonic()`` at which the request fails with :class:`DeadlineError`, also in the queue.
        id: joins the log lines of this request. Requests of one HTTP request share its id.
        adapter: name of a loaded LoRA adapter. None: the base model.
        group: requests share prefixes with requests of the same group only. Empty: a group, too.
        trace: headers such as ``traceparent``, which join traces of other processes to this request. The scheduler does
            not read them.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    logprobs: bool = True
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    generates: bool = True
    mask: TokenMask | None = None
    generated: tuple[int, ...] = ()
    deadline: float | None = None
    id: str = ""
    adapter: str | None = None
    group: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """The whole prompt was read; ``cached_tokens`` of it came from the cache. The first event, sent once.

    Attributes:
        scores: scores of the prompt's tokens, if requested.
        prompt_seconds: from the request's slot to the end of its prompt.
    """

    cached_tokens: int
    prompt_tokens: int
    scores: PromptScores | None = None
    prompt_seconds: float = 0.0

    @property
    def last(self) -> bool:
        return False


@dataclass(frozen=True)
class Generated:
    """One more token. The last one has a ``finish_reason``.

    Attributes:
        top: the requested number of likeliest tokens with their log-probabilities, best first.
        mask_seconds: seconds for the mask after this token; 0 without a mask.
    """

    token: Token
    top: tuple[tuple[int, float], ...] = ()
    mask_seconds: float = 0.0

    @property
    def last(self) -> bool:
        return self.token.finish_reason is not None


@dataclass(frozen=True)
class Failed:
    """The request ended with an error; nothing follows."""

    error: Glm4Error

    @property
    def last(self) -> bool:
        return True


Event = Started | Generated | Failed


@dataclass(frozen=True)
class SchedulerStats:
    """Statistics at one moment. All except the first three and ``parked`` only grow.

    Attributes:
        queued, active, slots: requests that wait for their first slot, requests with a slot, and slots.
        prompt_tokens: tokens of all prompts read, including those from the prefix cache (``cached_tokens``).
        stored_tokens: tokens read from the prefix cache on disk; also part of ``cached_tokens``.
        drafted_tokens: tokens guessed by prompt lookup or a draft model; ``accepted_tokens`` of them were right.
        requests: number of ended requests by outcome: stop, length, cancelled, timeout, failed, stopped.
        steps: steps that ran the model; ``step_seconds`` is their total time, ``model_seconds`` the part in the
            model.
        parked: requests that gave their slot back, because their clients do not read while other requests wait.
        preemptions: how often a request was parked; ``recomputed_tokens`` were run once more after a return.
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
    parked: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    stored_tokens: int = 0
