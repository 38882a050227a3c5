"""What the two routes that generate have in common: parameters, usage, and server-sent events."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from glm4_runtime.errors import DeadlineError
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Request, Started
from glm4_runtime.server import log, schema
from glm4_runtime.server.engine import ClientGoneError, Engine, Job
from glm4_runtime.server.errors import ApiError, api_error, encode
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
_DONE = b"data: [DONE]\n\n"

B = TypeVar("B", bound=schema.Sampling)
P = TypeVar("P", bound="Planned")


class Planned(Protocol):
    """What a request comes to, before anything is generated."""

    @property
    def requests(self) -> Sequence[Request]:
        """One for each sequence."""

    @property
    def prompts(self) -> Sequence[str]:
        """As the model sees them, for the log."""


class Answering(Protocol):
    """The reply to a request, whole or in chunks."""

    async def whole(self, http: HttpRequest) -> Response:
        """All of it at once."""

    def chunks(self, http: HttpRequest, ending: "Ending") -> AsyncGenerator[dict[str, Any], None]:
        """As it comes."""


async def answered(
    engine: Engine,
    body: B,
    http: HttpRequest,
    plan: Callable[[Engine, B, float], Awaitable[P]],
    answer: Callable[[Engine, B, P, Job], Answering],
) -> Response:
    """Check, plan off the event loop, generate, and reply as the request asks.

    Args:
        plan: from engine, body and deadline; ends at the deadline.
        answer: from engine, body, plan and the running job.
    """
    engine.require_model(body.model)
    engine.require_running()
    deadline = time.monotonic() + engine.options.request_timeout
    ending = require_stream_options(body)
    try:
        async with asyncio.timeout(engine.options.request_timeout):
            planned = await plan(engine, body, deadline)
    except TimeoutError as error:
        raise DeadlineError("the request was not prepared by its deadline") from error
    log.record()["user"] = body.user or body.safety_identifier
    if engine.options.log_prompts:
        log.record()["prompts"] = list(planned.prompts)
    reply = answer(engine, body, planned, engine.generate(planned.requests))
    if body.stream:
        return await event_stream(reply.chunks(http, ending))
    return await reply.whole(http)


def sampling_params(
    engine: Engine, body: schema.Sampling, max_tokens: int | None, choice: int, ends: Sequence[int] = ()
) -> SamplingParams:
    """The parameters of one of the request's replies: of several with a seed, each has a seed of its own.

    Args:
        ends: tokens that end a reply besides the model's own, unless these are ignored.
    """
    given = {name: getattr(body, name) for name in _GIVEN_AS_THEY_ARE if getattr(body, name) is not None}
    return SamplingParams(
        **engine.defaults | given,
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


def require_choices(engine: Engine, count: int) -> None:
    most = min(engine.options.max_choices, engine.options.max_queue)  # they are queued one by one, or none is
    if count > most:
        raise ApiError(400, f"{count} replies were asked for; this server gives {most}", param="n")


@dataclass(frozen=True)
class Ending:
    """What a stream tells in a last chunk without choices, as far as the client asked for it."""

    usage: bool = False
    timings: bool = False

    @property
    def no_usage(self) -> dict[str, Any]:
        """Of every chunk before."""
        return {"usage": None} if self.usage else {}

    def chunk(self, usage: "Usage", job: Job) -> dict[str, Any]:
        """The last chunk's own members; empty where there is no such chunk."""
        found: dict[str, Any] = {"choices": []} if self.usage or self.timings else {}
        if self.usage:
            found["usage"] = usage.as_json()
        if self.timings:
            found["timings"] = timings(job, usage)
        return found


def require_stream_options(body: schema.Sampling) -> Ending:
    """What the last chunk tells."""
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
    """The tokens of a request, over all its prompts and replies."""

    def __init__(self) -> None:
        self.prompt = self.cached = self.completion = self.reasoning = 0

    def start(self, event: Started, counts: bool) -> None:
        """``counts`` is False for further replies to one prompt, which OpenAI counts once."""
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


def timings(job: Job, usage: Usage) -> dict[str, float | None]:
    """Seconds to the first token, and the rate of those after it, over all replies; None where there is no such token."""
    if job.first_token is None:
        return {"first_token_seconds": None, "tokens_per_second": None}
    spent, further = job.last_token - job.first_token, usage.completion - 1
    return {
        "first_token_seconds": round(job.first_token - job.began, 4),
        "tokens_per_second": round(further / spent, 1) if further > 0 and spent > 0 else None,
    }


def note_answer(job: Job, usage: Usage, reasons: list[str | None]) -> None:
    """Put a request's figures into its line of the log."""
    log.record().update(
        prompt_tokens=usage.prompt,
        cached_tokens=usage.cached,
        completion_tokens=usage.completion,
        finish_reasons=reasons,
        **timings(job, usage),
    )


@contextlib.asynccontextmanager
async def watched(http: HttpRequest, job: Job) -> AsyncIterator[None]:
    """Ends the job as soon as the client has gone, and in any case at the end."""

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


async def event_stream(chunks: AsyncGenerator[dict[str, Any], None]) -> StreamingResponse:
    """Server-sent events. What fails before the first chunk is raised, and so gets a status of its own."""
    first = await anext(chunks)

    async def lines() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(chunks):
            yield _event(first)
            try:
                async for chunk in chunks:
                    yield _event(chunk)
            except ClientGoneError:
                return
            except Exception as error:
                told = api_error(error)
                log.refusal(told, error)
                yield _event(told.body)
            yield _DONE

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + encode(data) + b"\n\n"
