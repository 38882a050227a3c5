"""/v1/chat/completions"""

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from typing import ClassVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glm4_runtime.prompts import Prompt
from glm4_runtime.reasoning import begins_inside
from glm4_runtime.scheduler import Generated, Request, Started
from glm4_runtime.server import log, schema
from glm4_runtime.server.common import (
    Usage,
    answer_format,
    answered,
    note_answer,
    require_choices,
    require_stream_options,
    sampling_params,
    watched,
)
from glm4_runtime.server.conversation import definitions
from glm4_runtime.server.effort import require_effort
from glm4_runtime.server.errors import ApiError, Json
from glm4_runtime.server.event_stream import PLAIN_EVENTS, Chunk, EventStyle
from glm4_runtime.server.messages import Tool
from glm4_runtime.server.reply import CallRules, Delta, Reply
from glm4_runtime.server.running_replies import RunningReplies
from glm4_runtime.server.served_model import ServedModel
from glm4_runtime.structured import MAX_CALLS, Function, ReplyFormat

_ANY_ARGUMENTS = {"type": "object"}


@dataclass(frozen=True)
class ChatPlan:
    """The plan of a request: one scheduler request and one reply per choice."""

    requests: list[Request]
    replies: list[Reply]
    prompts: list[str]


@dataclass(frozen=True)
class Offer:
    """The functions that a reply may call, and whether it must call one."""

    tools: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    required: bool = False

    @property
    def strict(self) -> bool:
        return any(tool.function.strict for tool in self.callable)

    @property
    def names(self) -> list[str]:
        return [tool.function.name for tool in self.callable]

    @property
    def functions(self) -> tuple[Function, ...]:
        return tuple(
            Function(tool.function.name, tool.function.parameters or _ANY_ARGUMENTS) for tool in self.callable
        )


async def chat(served: ServedModel, body: schema.ChatRequest, http: HttpRequest) -> Response:
    return await answered(served, body, http, _plan, ChatAnswer)


async def _plan(served: ServedModel, body: schema.ChatRequest, deadline: float) -> ChatPlan:
    """The plan of this route's own requests. Other routes' options have other names and defaults."""
    planned = await plan(served, body, deadline)
    require_effort(body.reasoning_effort, begins_inside(planned.prompts[0]), "medium", "reasoning_effort")
    return planned


async def plan(served: ServedModel, body: schema.ChatRequest, deadline: float) -> ChatPlan:
    """Check a conversation, render its prompt, and compile the grammar of its reply.

    Args:
        deadline: on the clock of ``time.monotonic()``.
    """
    require_stream_options(body)
    served.require_grammars()
    if served.conversation is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs", param="top_logprobs")
    count = body.n or 1
    require_choices(served, count)
    offer = _offer(body)
    prompt = await served.rendered(body.messages, definitions(offer.tools))
    return await served.prepare(lambda: _planned(served, body, deadline, offer, prompt), slow=body.has_form)


def _planned(
    served: ServedModel, body: schema.ChatRequest, deadline: float, offer: Offer, rendered: Prompt
) -> ChatPlan:
    grammars, count, max_tokens = served.require_grammars(), body.n or 1, _max_tokens(body)
    ids, prompt = served.encode_prompt(rendered), rendered.text
    served.require_room(ids)
    inside = begins_inside(prompt)
    max_calls = 1 if body.parallel_tool_calls is False else None
    form = _form(served, body, offer, max_calls or MAX_CALLS)
    bounded = _with_limit(form, body, inside)
    mask = None if bounded is None else grammars.compile(bounded, inside)
    requests = [
        Request(
            prompt_ids=ids,
            params=sampling_params(served, body, max_tokens, choice, served.turn_ends),
            logprobs=bool(body.logprobs),
            top_logprobs=body.top_logprobs or 0,
            mask=mask if mask is None or choice == 0 else mask.copy(),
            deadline=deadline,
            adapter=served.names.adapter_of(body.model),
        )
        for choice in range(count)
    ]
    rules = CallRules(offer.names, form is None, max_calls, served.turn_token)
    replies = [
        Reply(
            inside_thought=inside,
            call_rules=rules,
            ends=served.ends,
            token_bytes=grammars.token_bytes if body.logprobs else None,
        )
        for _ in range(count)
    ]
    return ChatPlan(requests, replies, [prompt])


def _max_tokens(body: schema.ChatRequest) -> int | None:
    if (
        None not in (body.max_tokens, body.max_completion_tokens)
        and body.max_tokens != body.max_completion_tokens
    ):
        raise ApiError(
            400,
            f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}; give one",
            param="max_tokens",
        )
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def _offer(body: schema.ChatRequest) -> Offer:
    tools = tuple(body.tools or ())
    choice = body.tool_choice or "auto"
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have the same name", param="tools")
    if choice == "none" or (choice == "auto" and not tools):
        return Offer()
    if not tools:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
    if isinstance(choice, schema.ChosenTool):
        chosen = tuple(tool for tool in tools if tool.function.name == choice.function.name)
        if not chosen:
            raise ApiError(
                400,
                f"tool_choice names {choice.function.name!r}, but the tools are: {', '.join(names)}",
                param="tool_choice",
            )
        return Offer(tools, chosen, required=True)
    return Offer(tools, tools, required=choice == "required")


def _form(served: ServedModel, body: schema.ChatRequest, offer: Offer, max_calls: int) -> ReplyFormat | None:
    """The format of the reply; None if it is free."""
    answer = answer_format(body.response_format)
    if answer is None and not offer.required and not offer.strict:
        return None
    enveloped = served.conversation is not None and served.conversation.traits.enveloped
    return ReplyFormat(answer, offer.functions, offer.required, max_calls, enveloped=enveloped)


def _with_limit(form: ReplyFormat | None, body: schema.ChatRequest, thinks: bool) -> ReplyFormat | None:
    """The format with the limit of the thinking. A free reply may have one, too."""
    if body.thinking_budget is not None and not thinks:
        raise ApiError(400, "this model does not think, so that no budget is needed", param="thinking_budget")
    if body.thinking_limit is None or not thinks:
        return form
    return replace(form or ReplyFormat(turn=False), thinking_budget=body.thinking_limit)


class ChatRun:
    """The replies of a planned request while they are generated.

    Attributes:
        replies: one per choice.
        usage: complete after the steps.
        job: the running sequences.
    """

    def __init__(self, served: ServedModel, plan: ChatPlan, job: RunningReplies) -> None:
        self.replies, self.usage, self.job = plan.replies, Usage(), job
        self._served = served

    @contextlib.asynccontextmanager
    async def steps(self, http: HttpRequest) -> AsyncIterator[AsyncIterator[tuple[int, Delta]]]:
        """Gives each choice's number and delta: one with the role at its start, an empty one at its end."""
        try:
            async with watched(http, self.job):
                yield self._steps()
        finally:
            self._finish()

    async def _steps(self) -> AsyncIterator[tuple[int, Delta]]:
        async for index, event in self.job.events():
            for delta in self._deltas(index, event):
                yield index, delta

    def _deltas(self, index: int, event: Started | Generated) -> list[Delta]:
        if isinstance(event, Started):
            self.usage.start(event, counts=index == 0)
            return [{"role": "assistant", "content": ""}]
        reply = self.replies[index]
        deltas = reply.push(event)
        if reply.finish_reason is None:
            return deltas
        self.job.end(index)
        return [*deltas, {}]

    def _finish(self) -> None:
        self.usage.completion = sum(reply.tokens for reply in self.replies)
        self.usage.reasoning = sum(reply.thought_tokens for reply in self.replies)
        note_answer(self.job, self.usage, [reply.finish_reason for reply in self.replies])
        if self._served.options.keeps_prompts:
            log.record()["answers"] = [reply.message for reply in self.replies]


class ChatAnswer:
    """The answer to one request, whole or in chunks."""

    style: ClassVar[EventStyle] = PLAIN_EVENTS

    def __init__(
        self, served: ServedModel, body: schema.ChatRequest, plan: ChatPlan, job: RunningReplies
    ) -> None:
        self._run = ChatRun(served, plan, job)
        self._with_logprobs = bool(body.logprobs)
        self._ending = require_stream_options(body)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self, http: HttpRequest) -> Json:
        async with self._run.steps(http) as steps:
            async for _ in steps:
                pass
        choices = [
            {
                "index": index,
                "message": reply.message,
                "logprobs": {"content": reply.logprobs, "refusal": None} if self._with_logprobs else None,
                "finish_reason": reply.finish_reason,
            }
            for index, reply in enumerate(self._run.replies)
        ]
        head = self._head | {"object": "chat.completion"}
        return Json(head | {"choices": choices, "usage": self._run.usage.as_json()})

    async def chunks(self, http: HttpRequest) -> AsyncGenerator[Chunk, None]:
        ending = self._ending
        async with self._run.steps(http) as steps:
            async for index, delta in steps:
                yield self._chunk(index, delta) | ending.no_usage
        if last := ending.chunk(self._run.usage, self._run.job):
            yield self._head | {"object": "chat.completion.chunk"} | last

    def failed(self, told: ApiError) -> Chunk:
        return told.body

    def _chunk(self, index: int, delta: Delta) -> Chunk:
        reply = self._run.replies[index]
        logprobs = reply.take_logprobs() if self._with_logprobs and "role" not in delta else []
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": None if delta else reply.finish_reason,
        }
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}
