"""/v1/completions"""

import codecs
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glm4_runtime.scheduler import Generated, Request, Started
from glm4_runtime.scoring import PromptScores
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
from glm4_runtime.server.errors import ApiError, Json
from glm4_runtime.server.event_stream import PLAIN_EVENTS, Chunk, EventStyle
from glm4_runtime.server.prompt_scores import prompt_entries, prompt_logprobs
from glm4_runtime.server.reply import token_logprobs
from glm4_runtime.server.running_replies import RunningReplies
from glm4_runtime.server.served_model import ServedModel
from glm4_runtime.structured import GrammarMask, ReplyFormat
from glm4_runtime.text_pieces import TextPieces

_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclass
class ChoiceText:
    """The text of one choice so far; ``echo`` is what it starts with.

    ``characters``: number of characters of its tokens with log-probabilities, whose text may still be held back.
    ``prompt``: as the client sent it. ``ids``: the model's input. ``scores``: the scores of ``ids``.
    """

    echo: str = ""
    prompt: str | Sequence[int] = ""
    ids: tuple[int, ...] = ()
    scores: PromptScores | None = None
    text: TextPieces = field(default_factory=TextPieces)
    tokens: int = 0
    finish_reason: str | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    characters: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: _UTF8("replace"))

    def note(self, entry: dict[str, Any], shown: bool = True) -> None:
        """Record a token's log-probabilities, and its position in the text; a control token has no text."""
        self.logprobs.append(entry | {"offset": len(self.echo) + self.characters})
        if shown:
            self.characters += len(self.decoder.decode(bytes(entry["bytes"])))


@dataclass(frozen=True)
class CompletionPlan:
    requests: list[Request]
    choices: list[ChoiceText]
    prompts: list[str]


async def complete(served: ServedModel, body: schema.CompletionRequest, http: HttpRequest) -> Response:
    return await answered(served, body, http, _plan, CompletionAnswer)


def as_list(given: Any) -> list[Any]:
    """A list of texts or of lists of ids; a single one becomes a list."""
    return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)


def encoded(served: ServedModel, given: str | Sequence[int]) -> tuple[int, ...]:
    if isinstance(given, str):
        return served.encode(given)
    served.require_prompt(given)
    return tuple(given)


async def _plan(served: ServedModel, body: schema.CompletionRequest, deadline: float) -> CompletionPlan:
    require_stream_options(body)
    return await served.prepare(lambda: _planned(served, body, deadline), slow=body.has_form)


def _planned(served: ServedModel, body: schema.CompletionRequest, deadline: float) -> CompletionPlan:
    served.require_grammars()
    scored = _prompt_top(body)
    if scored is not None and body.stream:
        raise ApiError(
            400,
            "log-probabilities of a prompt are not streamed; leave stream out, or echo and prompt_logprobs",
            param="stream",
        )
    generates = body.max_tokens != 0
    prompts, n = as_list(body.prompt), body.n or 1
    require_choices(served, len(prompts) * n)
    mask = _mask(served, body)
    plan = CompletionPlan([], [], [])
    for prompt in prompts:
        ids = encoded(served, prompt)
        if generates:
            served.require_room(ids)
        text = prompt if isinstance(prompt, str) else served.tokenizer.decode(ids, skip_special_tokens=False)
        plan.prompts.append(text)
        for number in range(n):
            plan.requests.append(
                Request(
                    prompt_ids=ids,
                    params=sampling_params(served, body, body.max_tokens or None, len(plan.requests)),
                    logprobs=body.logprobs is not None,
                    top_logprobs=body.logprobs or 0,
                    prompt_logprobs=scored if number == 0 else None,
                    generates=generates,
                    mask=None if mask is None else mask.copy(),
                    deadline=deadline,
                    adapter=served.names.adapter_of(body.model),
                )
            )
            plan.choices.append(ChoiceText(text if body.echo else "", prompt, ids))
    return plan


def _prompt_top(body: schema.CompletionRequest) -> int | None:
    """Number of likeliest tokens to report at each position of a prompt; None if the prompt is not scored."""
    echoed = body.logprobs if body.echo else None
    wanted = [count for count in (echoed, body.prompt_logprobs) if count is not None]
    return max(wanted, default=None)


def _mask(served: ServedModel, body: schema.CompletionRequest) -> GrammarMask | None:
    answer = answer_format(body.response_format)
    if answer is None:
        return None
    return served.require_grammars().compile(ReplyFormat(answer, turn=False), thinking=False)


class CompletionAnswer:
    """The answer to one request, whole or in chunks."""

    style: ClassVar[EventStyle] = PLAIN_EVENTS

    def __init__(
        self, served: ServedModel, body: schema.CompletionRequest, plan: CompletionPlan, job: RunningReplies
    ) -> None:
        self._served, self._choices, self._job = served, plan.choices, job
        self._n = body.n or 1
        self._with_logprobs = body.logprobs is not None
        self._body = body
        self._usage = Usage()
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self, http: HttpRequest) -> Json:
        async with watched(http, self._job):
            async for _ in self._steps():
                pass
        scored = _prompt_top(self._body) is not None
        choices = await self._served.prepare(self._listed, slow=True) if scored else self._listed()
        return Json(self._head | {"choices": choices, "usage": self._usage.as_json()})

    def _listed(self) -> list[dict[str, Any]]:
        """All choices, each with the scores of its prompt, if requested."""
        listed = []
        for index, choice in enumerate(self._choices):
            first = self._choices[index - index % self._n]  # one prompt is scored once
            whole = self._choice(index, choice.echo + str(choice.text), choice.logprobs, choice.finish_reason)
            listed.append(whole | self._scored(choice, first.scores))
        return listed

    def _scored(self, choice: ChoiceText, scores: PromptScores | None) -> dict[str, Any]:
        if scores is None:
            return {}
        body, served = self._body, self._served
        found: dict[str, Any] = {}
        if body.echo and body.logprobs is not None:
            before = prompt_entries(served, choice.ids, choice.prompt, scores, body.logprobs)
            found["logprobs"] = legacy_logprobs(before + choice.logprobs)
        if body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(served, choice.ids, scores, body.prompt_logprobs)
        return found

    async def chunks(self, http: HttpRequest) -> AsyncGenerator[Chunk, None]:
        ending = require_stream_options(self._body)
        async with watched(http, self._job):
            async for index, text, logprobs in self._steps():
                reason = self._choices[index].finish_reason
                choice = self._choice(index, text, logprobs, reason)
                yield self._head | {"choices": [choice]} | ending.no_usage
        if last := ending.chunk(self._usage, self._job):
            yield self._head | last

    def failed(self, told: ApiError) -> Chunk:
        return told.body

    async def _steps(self) -> AsyncGenerator[tuple[int, str, list[dict[str, Any]]], None]:
        """Yields each choice's number, its next text, and the log-probabilities of the token."""
        try:
            async for index, event in self._job.events():
                choice = self._choices[index]
                if isinstance(event, Started):
                    self._usage.start(event, counts=index % self._n == 0)
                    choice.scores = event.scores
                    if self._body.max_tokens == 0:
                        choice.finish_reason = "length"
                    if choice.echo or choice.finish_reason is not None:
                        yield index, choice.echo, []
                    continue
                logprobs = self._take(choice, event)
                if event.token.text or logprobs or choice.finish_reason is not None:
                    yield index, event.token.text, logprobs
        finally:
            self._usage.completion = sum(choice.tokens for choice in self._choices)
            note_answer(self._job, self._usage, [choice.finish_reason for choice in self._choices])
            if self._served.options.keeps_prompts:
                log.record()["answers"] = [str(choice.text) for choice in self._choices]

    def _take(self, choice: ChoiceText, event: Generated) -> list[dict[str, Any]]:
        token = event.token
        choice.tokens += 1
        choice.text.add(token.text)
        choice.finish_reason = token.finish_reason
        if not self._with_logprobs:
            return []
        shown = token.id not in self._served.tokenizer.special_ids  # a control token is no text
        choice.note(token_logprobs(event, self._served.require_grammars().token_bytes), shown=shown)
        return choice.logprobs[-1:]

    def _choice(
        self, index: int, text: str, logprobs: list[dict[str, Any]], reason: str | None
    ) -> dict[str, Any]:
        listed = legacy_logprobs(logprobs) if self._with_logprobs else None
        return {"index": index, "text": text, "logprobs": listed, "finish_reason": reason}


def legacy_logprobs(entries: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """OpenAI's legacy log-probabilities. ``text_offset`` counts characters; a token without a complete character adds
    0."""
    return {
        "tokens": [_legacy_name(entry) for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            None
            if entry["top_logprobs"] is None
            else {
                _legacy_name(other): other["logprob"]
                for other in (*entry["top_logprobs"], entry)  # always includes the token itself
            }
            for entry in entries
        ],
        "text_offset": [entry["offset"] for entry in entries],
    }


def _legacy_name(entry: dict[str, Any]) -> str:
    """A token's text; of one that is no text by itself, its bytes, as bytes:\\xf0\\x9f."""
    if "\ufffd" not in entry["token"] or not entry["bytes"]:
        return str(entry["token"])
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
