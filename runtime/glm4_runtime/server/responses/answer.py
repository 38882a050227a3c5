"""Writes a reply as a response of the Responses API, whole or as events."""

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, ClassVar

from starlette.requests import Request as HttpRequest

from glm4_runtime.server.chat import ChatPlan, ChatRun
from glm4_runtime.server.errors import ApiError, Json
from glm4_runtime.server.event_stream import NAMED_EVENTS, Chunk, EventStyle
from glm4_runtime.server.parts import Parts
from glm4_runtime.server.reply import Delta
from glm4_runtime.server.responses.items import ItemWriter
from glm4_runtime.server.responses.schema import ENCRYPTED, ResponsesRequest

Response = dict[str, Any]

# status of an error within a stream -> its code
_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class ResponsesAnswer:
    """The answer to one request. ``keep`` is called with the finished response."""

    style: ClassVar[EventStyle] = NAMED_EVENTS

    def __init__(
        self, run: ChatRun, body: ResponsesRequest, plan: ChatPlan, keep: Callable[[Response], None]
    ) -> None:
        self._run, self._keep, self._parts = run, keep, Parts()
        self._writer = ItemWriter(
            body.with_summary,
            ENCRYPTED in (body.include or ()),
            run.replies[0] if body.with_logprobs else None,
        )
        self._number = -1
        self._response = _begun(body, plan)

    async def whole(self, http: HttpRequest) -> Json:
        async for _ in self.chunks(http):
            pass
        return Json(self._response)

    async def chunks(self, http: HttpRequest) -> AsyncGenerator[Chunk, None]:
        async with self._run.steps(http) as steps:
            async for _, delta in steps:
                for event in self._events(delta):
                    yield self._numbered(event)
        self._end()
        self._keep(self._response)
        yield self._numbered(self._told(self._response["status"]))

    def failed(self, told: ApiError) -> Chunk:
        code = _CODES.get(told.status, "server_error")
        self._response |= {"status": "failed", "error": {"code": code, "message": str(told)}}
        return self._numbered(self._told("failed"))

    def _events(self, delta: Delta) -> Iterator[Chunk]:
        if "role" in delta:
            yield self._told("created")
            yield self._told("in_progress")
        if not delta and not self._parts.listed:  # clients expect an item, also of an empty reply
            for event in self._parts.begin("text"):
                yield from self._writer.events(event)
        cut = not delta and self._run.replies[0].finish_reason == "length"
        for event in self._parts.push(delta):
            yield from self._writer.events(event, cut)
        self._writer.skip_logprobs()

    def _end(self) -> None:
        cut, usage = self._run.replies[0].finish_reason == "length", self._run.usage
        self._response |= {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._writer.items,
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.prompt + usage.completion,
            },
        }

    def _told(self, event: str) -> Chunk:
        return {"type": f"response.{event}", "response": dict(self._response)}

    def _numbered(self, event: Chunk) -> Chunk:
        self._number += 1
        return event | {"sequence_number": self._number}


def _begun(body: ResponsesRequest, plan: ChatPlan) -> Response:
    """The response before its first token: what was asked, with the values of all defaults."""
    params = plan.requests[0].params
    given = body.model_dump(by_alias=True)
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "completed_at": None,
        "output": [],
        "usage": None,
        **{name: given[name] for name in _ECHOED},
        "metadata": given["metadata"] or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": _without_none(given["reasoning"]),
        "service_tier": "default",
        "temperature": params.temperature,
        "text": {"format": _without_none((given["text"] or {}).get("format")) or {"type": "text"}},
        "tool_choice": given["tool_choice"] or "auto",
        "tools": given["tools"] or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
    }


_ECHOED = (
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "model",
    "previous_response_id",
    "prompt_cache_key",
    "safety_identifier",
    "user",
)


def _without_none(given: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (given or {}).items() if value is not None}
