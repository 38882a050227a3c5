"""Shared parts of the routes that generate text: sampling parameters, usage, and the way of a request."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glm4_runtime.errors import DeadlineError
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Request, Started
from glm4_runtime.server import log, schema
from glm4_runtime.server.connections import is_blocked
from glm4_runtime.server.errors import ApiError
from glm4_runtime.server.event_stream import Chunk, EventStyle, event_stream
from glm4_runtime.server.guard import trace_of
from glm4_runtime.server.running_replies import RunningReplies
from glm4_runtime.server.served_model import ServedModel
from glm4_runtime.structured import AnswerFormat

_GIVEN_AS_THEY_ARE = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "stop",
)

B = TypeVar("B", bound="Asked")
P = TypeVar("P", bound="Planned")


class Asked(Protocol):
    """The body of a request that generates text."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def stream(self) -> bool | None:
        """Whether the reply is sent in chunks."""

    @property
    def asked_by(self) -> str | None:
        """Whom the request is for; written to the log."""


class Planned(Protocol):
    """A request after validation and encoding, before generation."""

    @property
    def requests(self) -> Sequence[Request]:
        """One scheduler request per sequence."""

    @property
    def prompts(self) -> Sequence[str]:
        """The rendered prompts, for the log."""


class Answering(Protocol):
    """The reply to a request, whole or in chunks.

    Attributes:
        style: how the chunks are written.
    """

    style: ClassVar[EventStyle]

    async def whole(self, http: HttpRequest) -> Response:
        """The complete reply in one response."""

    def chunks(self, http: HttpRequest) -> AsyncGenerator[Chunk, None]:
        """The chunks of a streamed reply, as they are generated."""

    def failed(self, told: ApiError) -> Chunk:
        """The last chunk of a stream that fails."""


async def answered(
    served: ServedModel,
    body: B,
    http: HttpRequest,
    plan: Callable[[ServedModel, B, float], Awaitable[P]],
    answer: Callable[[ServedModel, B, P, RunningReplies], Answering],
) -> Response:
    """Validate a request, plan it, start generation, and return a whole or streamed reply.

    Args:
        plan: makes the plan from the served model, body and deadline. It is cancelled at the deadline.
        answer: makes the reply from the served model, body, plan and the running replies.

    Raises:
        DeadlineError: the plan was not ready by the deadline.
    """
    served.require_model(body.model)
    log.record()["model"] = body.model
    served.require_running()
    deadline = time.monotonic() + served.options.request_timeout
    try:
        async with asyncio.timeout(served.options.request_timeout):
            planned = await plan(served, body, deadline)
    except TimeoutError as error:
        raise DeadlineError("the request was not prepared by its deadline") from error
    log.record()["user"] = body.asked_by
    if served.options.keeps_prompts:
        log.record()["prompts"] = list(planned.prompts)
    trace = trace_of(http.scope)
    job = served.generate(planned.requests, is_blocked(http.scope), {} if trace is None else trace.headers)
    if trace is not None:
        trace.submitted(planned.requests, job.times, bool(body.stream))
    reply = answer(served, body, planned, job)
    if body.stream:
        return await event_stream(reply.chunks(http), reply.style, reply.failed)
    return await reply.whole(http)


def sampling_params(
    served: ServedModel, body: schema.Sampling, max_tokens: int | None, choice: int, ends: Sequence[int] = ()
) -> SamplingParams:
    """The sampling parameters of one reply.

    Args:
        choice: index of the reply. It is added to the seed, so that several replies differ.
        ends: ids of tokens that end a reply besides the model's EOS tokens. Unused with ``ignore_eos``.
    """
    given = {name: getattr(body, name) for name in _GIVEN_AS_THEY_ARE if getattr(body, name) is not None}
    return SamplingParams(
        **served.defaults | given,
        logit_bias=_logit_bias(body.logit_bias or {}),
        seed=None if body.seed is None else body.seed + choice,
        ignore_eos=bool(body.ignore_eos),
        max_tokens=max_tokens,
        stop_token_ids=(*(body.stop_token_ids or ()), *(() if body.ignore_eos else ends)),
    )


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    wrong = [name for name in given if not (name.isascii() and name.isdigit() and len(name) < 12)]
    if wrong:
        raise ApiError(
            400, f"logit_bias maps token ids to numbers; {wrong[0][:40]!r} is no id", param="logit_bias"
        )
    return {int(name): value for name, value in given.items()}


def require_choices(served: ServedModel, count: int) -> None:
    most = min(served.options.max_choices, served.options.max_queue)  # the queue must hold all replies
    if count > most:
        raise ApiError(400, f"{count} replies were asked for; this server gives {most}", param="n")


@dataclass(frozen=True)
class Ending:
    """The members that a client asked for in the last chunk of a stream. This chunk has no choices."""

    usage: bool = False
    timings: bool = False

    @property
    def no_usage(self) -> dict[str, Any]:
        """Members of every earlier chunk: OpenAI sends ``usage: null`` there if usage was asked for."""
        return {"usage": None} if self.usage else {}

    def chunk(self, usage: "Usage", job: RunningReplies) -> dict[str, Any]:
        """The members of the last chunk. Empty: the client asked for none, and no such chunk is sent."""
        found: dict[str, Any] = {"choices": []} if self.usage or self.timings else {}
        if self.usage:
            found["usage"] = usage.as_json()
        if self.timings:
            found["timings"] = timings(job, usage)
        return found


def require_stream_options(body: schema.Sampling) -> Ending:
    """The last chunk's members. Raises :class:`ApiError` if options of a stream come without ``stream``."""
    options = body.stream_options or schema.StreamOptions()
    for name in ("include_usage", "include_timings"):
        if getattr(options, name) and not body.stream:
            raise ApiError(400, f"stream_options.{name} goes with stream", param="stream_options")
    return Ending(bool(options.include_usage), bool(options.include_timings))


def answer_format(asked: Any) -> AnswerFormat | None:
    if asked is None or isinstance(asked, schema.TextFormat):
        return None
    if isinstance(asked, schema.JsonSchemaFormat):
        return AnswerFormat("json_schema", asked.json_schema.schema_)
    if isinstance(asked, schema.RegexFormat):
        return AnswerFormat("regex", asked.regex)
    if isinstance(asked, schema.GrammarFormat):
        return AnswerFormat("grammar", asked.grammar)
    return AnswerFormat("json_schema", {"type": "object"})


class Usage:
    """Numbers of tokens of a request, summed over its prompts and replies."""

    def __init__(self) -> None:
        self.prompt = self.cached = self.completion = self.reasoning = 0

    def start(self, event: Started, counts: bool) -> None:
        """Count a prompt. ``counts`` is False for further replies to the same prompt: OpenAI counts a prompt once."""
        if counts:
            self.prompt += event.prompt_tokens
            self.cached += event.cached_tokens

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


def timings(job: RunningReplies, usage: Usage) -> dict[str, float | None]:
    """Seconds to the first token, and tokens per second after it, over all replies. None: too few tokens."""
    if job.first_token is None:
        return {"first_token_seconds": None, "tokens_per_second": None}
    spent, further = job.last_token - job.first_token, usage.completion - 1
    return {
        "first_token_seconds": round(job.first_token - job.began, 4),
        "tokens_per_second": round(further / spent, 1) if further > 0 and spent > 0 else None,
    }


def note_answer(job: RunningReplies, usage: Usage, reasons: list[str | None]) -> None:
    """Add token counts, timings and finish reasons to the request's log line."""
    log.record().update(
        prompt_tokens=usage.prompt,
        cached_tokens=usage.cached,
        completion_tokens=usage.completion,
        finish_reasons=reasons,
        **timings(job, usage),
    )


@contextlib.asynccontextmanager
async def watched(http: HttpRequest, job: RunningReplies) -> AsyncIterator[None]:
    """Abandon the job if the client disconnects, and close the job at the end of the ``with`` block."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        job.abandon()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        job.close()
        watcher.cancel()
