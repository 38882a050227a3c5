"""Writes a reply as a message of Anthropic's API, whole or as events."""

import hashlib
import json
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, ClassVar

from starlette.requests import Request as HttpRequest

from glm4_runtime.server.anthropic.errors import error_body
from glm4_runtime.server.anthropic.schema import MessagesRequest
from glm4_runtime.server.chat import ChatPlan, ChatRun
from glm4_runtime.server.errors import ApiError, Json
from glm4_runtime.server.event_stream import NAMED_EVENTS, Chunk, EventStyle
from glm4_runtime.server.parts import Part, PartEvent, Parts
from glm4_runtime.server.running_replies import RunningReplies
from glm4_runtime.server.served_model import ServedModel

Block = dict[str, Any]


class MessagesAnswer:
    """The answer to one request."""

    style: ClassVar[EventStyle] = NAMED_EVENTS

    def __init__(
        self, served: ServedModel, body: MessagesRequest, plan: ChatPlan, job: RunningReplies
    ) -> None:
        self._run, self._parts = ChatRun(served, plan, job), Parts()
        self._max_tokens = body.max_tokens
        self._omits_thinking = body.thinking is not None and body.thinking.display == "omitted"
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": body.model,
        }

    async def whole(self, http: HttpRequest) -> Json:
        async with self._run.steps(http) as steps:
            async for _, delta in steps:
                for _ in self._parts.push(delta):
                    pass
        blocks = [self._block(part) for part in self._parts.listed]
        return Json(self._head | {"content": blocks} | self._stop | {"usage": self._usage})

    async def chunks(self, http: HttpRequest) -> AsyncGenerator[Chunk, None]:
        async with self._run.steps(http) as steps:
            async for _, delta in steps:
                if "role" in delta:
                    yield self._start
                    yield {"type": "ping"}
                for event in self._parts.push(delta):
                    for chunk in self._events(event):
                        yield chunk
        yield {"type": "message_delta", "delta": self._stop, "usage": self._usage}
        yield {"type": "message_stop"}

    def failed(self, told: ApiError) -> Chunk:
        return error_body(told)

    @property
    def _start(self) -> Chunk:
        empty: Chunk = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage}
        return {"type": "message_start", "message": self._head | empty}

    @property
    def _usage(self) -> dict[str, Any]:
        """As in Anthropic's API, ``input_tokens`` leaves out the tokens that came from the cache."""
        usage = self._run.usage
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.completion,
            "output_tokens_details": {"thinking_tokens": usage.reasoning},
        }

    @property
    def _stop(self) -> dict[str, Any]:
        reply, usage = self._run.replies[0], self._run.usage
        if reply.finish_reason == "length":
            cut = usage.completion >= self._max_tokens
            return _stopped("max_tokens" if cut else "model_context_window_exceeded")
        if reply.stop is not None:
            return _stopped("stop_sequence", reply.stop)
        return _stopped("tool_use" if reply.finish_reason == "tool_calls" else "end_turn")

    def _events(self, event: PartEvent) -> Iterator[Chunk]:
        part, index = event.part, event.part.index
        if event.stage == "begins":
            yield {"type": "content_block_start", "index": index, "content_block": _BEGUN[part.kind](part)}
        elif event.stage == "grows":
            if part.kind != "thinking" or not self._omits_thinking:
                kind, key = _DELTAS[part.kind]
                delta = {"type": kind, key: event.text}
                yield {"type": "content_block_delta", "index": index, "delta": delta}
        else:
            if part.kind == "thinking":
                delta = {"type": "signature_delta", "signature": _signature(part)}
                yield {"type": "content_block_delta", "index": index, "delta": delta}
            yield {"type": "content_block_stop", "index": index}

    def _block(self, part: Part) -> Block:
        block = _BEGUN[part.kind](part)
        if part.kind == "call":
            return block | {"input": _input(str(part.text))}
        if part.kind == "text":
            return block | {"text": str(part.text)}
        shown = "" if self._omits_thinking else str(part.text)
        return block | {"thinking": shown, "signature": _signature(part)}


def _stopped(reason: str, sequence: str | None = None) -> dict[str, Any]:
    return {"stop_reason": reason, "stop_sequence": sequence}


def _tool_id(part: Part) -> str:
    return part.call_id.replace("call_", "toolu_", 1)


def _signature(part: Part) -> str:
    """Clients require a signature. This server checks none: thinking does not go back to the model."""
    return hashlib.sha256(str(part.text).encode("utf-8", "surrogatepass")).hexdigest()


def _input(arguments: str) -> dict[str, Any]:
    """The arguments as an object. Text that is no JSON has the key that Anthropic's documentation recommends."""
    try:
        found = json.loads(arguments or "{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return {"INVALID_JSON": arguments}
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


# kind of part -> its block before its first delta, and its delta's type and key
_BEGUN: dict[str, Callable[[Part], Block]] = {
    "thinking": lambda _: {"type": "thinking", "thinking": "", "signature": ""},
    "text": lambda _: {"type": "text", "text": "", "citations": None},
    "call": lambda part: {"type": "tool_use", "id": _tool_id(part), "name": part.name, "input": {}},
}
_DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}
