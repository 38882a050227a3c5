"""The routes of Anthropic's API."""

from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from glm4_runtime.reasoning import begins_inside
from glm4_runtime.server import chat
from glm4_runtime.server.anthropic.answer import MessagesAnswer
from glm4_runtime.server.anthropic.request import chat_request, messages_of, require_thinking, tools_of
from glm4_runtime.server.anthropic.schema import CountRequest, MessagesRequest, NoChoice
from glm4_runtime.server.common import answered
from glm4_runtime.server.conversation import definitions
from glm4_runtime.server.errors import ApiError, Json
from glm4_runtime.server.served_model import ServedModel


def add_routes(app: FastAPI, served: ServedModel) -> None:
    @app.post("/v1/messages", tags=["anthropic"], summary="Answer a conversation.")
    async def messages(body: MessagesRequest, request: Request) -> Response:
        return await answered(served, body, request, _plan, MessagesAnswer)

    @app.post("/v1/messages/count_tokens", tags=["anthropic"], summary="Count the tokens of a conversation.")
    async def count_tokens(body: CountRequest) -> Response:
        return await _count(served, body)


async def _plan(served: ServedModel, body: MessagesRequest, deadline: float) -> chat.ChatPlan:
    asked = await served.prepare(lambda: chat_request(body))
    plan = await chat.plan(served, asked, deadline)
    require_thinking(body, begins_inside(plan.prompts[0]))
    return plan


async def _count(served: ServedModel, body: CountRequest) -> Json:
    served.require_model(body.model)
    if served.conversation is None:
        raise ApiError(400, "this model has no chat template, so that no conversation can be counted")
    tools = [] if isinstance(body.tool_choice, NoChoice) else tools_of(body) or []
    turns = await served.prepare(lambda: messages_of(body))
    prompt = await served.rendered(turns, definitions(tools))
    require_thinking(body, begins_inside(prompt.text))
    ids = await served.prepare(lambda: served.tokenizer.encode_prompt(prompt))
    return Json({"input_tokens": len(ids)})


def listed_models(models: list[dict[str, Any]]) -> dict[str, Any]:
    """The list of models in Anthropic's form, all on one page."""
    data = [described_model(model) for model in models]
    return {"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}


def described_model(model: dict[str, Any]) -> dict[str, Any]:
    """A model of OpenAI's list in Anthropic's form."""
    return {
        "type": "model",
        "id": model["id"],
        "display_name": model["id"],
        "created_at": datetime.fromtimestamp(model["created"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": model["max_model_len"],
        "max_tokens": model["max_model_len"],
    }
