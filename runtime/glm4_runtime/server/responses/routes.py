"""The routes of the Responses API."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from glm4_runtime.reasoning import begins_inside
from glm4_runtime.server import chat
from glm4_runtime.server.common import answered
from glm4_runtime.server.errors import ApiError, Json, encode
from glm4_runtime.server.guard import key_of
from glm4_runtime.server.responses.answer import ResponsesAnswer
from glm4_runtime.server.responses.request import chat_request, require_reasoning
from glm4_runtime.server.responses.schema import Item, MessageItem, ResponsesRequest
from glm4_runtime.server.responses.store import ResponseStore, Stored
from glm4_runtime.server.running_replies import RunningReplies
from glm4_runtime.server.schema import ChatRequest
from glm4_runtime.server.served_model import ServedModel

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
_PATH = "/v1/responses/{response_id}"


def add_routes(app: FastAPI, served: ServedModel) -> None:
    store = ResponseStore(served.options.max_stored)

    @app.post("/v1/responses", tags=["openai"], summary="Answer a conversation of items.")
    async def create(body: ResponsesRequest, request: Request) -> Response:
        exchange = _Exchange(store, body, key_of(request.scope))
        return await answered(served, body, request, exchange.plan, exchange.answer)

    @app.get(_PATH, tags=["openai"], summary="A stored response.")
    async def retrieve(response_id: str, request: Request) -> Response:
        _require_plain(request)
        return Json(store.get(key_of(request.scope), response_id).response)

    @app.delete(_PATH, tags=["openai"], summary="Delete a stored response.")
    async def delete(response_id: str, request: Request) -> Response:
        store.delete(key_of(request.scope), response_id)
        return Json({"id": response_id, "object": "response", "deleted": True})

    @app.post(f"{_PATH}/cancel", tags=["openai"], summary="Refused: no response runs in the background.")
    async def cancel(response_id: str, request: Request) -> Response:
        store.get(key_of(request.scope), response_id)
        raise ApiError(
            400,
            "only a response that runs in the background can be cancelled, and this server has none; to end a running "
            "response, close its connection",
        )


def _require_plain(request: Request) -> None:
    """Refuse options of a stored response that this server does not implement."""
    for name, value in request.query_params.items():
        if (name, value.lower()) != ("stream", "false"):
            raise ApiError(
                400, f"{name[:100]} is not implemented for a stored response; leave it out", param=name[:100]
            )


class _Exchange:
    """One request, from its body to the stored response."""

    def __init__(self, store: ResponseStore, body: ResponsesRequest, owner: bytes) -> None:
        self._store, self._body, self._owner = store, body, owner
        self._earlier: Sequence[Item] = ()
        self._given: Sequence[Item] = ()
        self._size, self._keeps = 0, False

    async def plan(self, served: ServedModel, body: ResponsesRequest, deadline: float) -> chat.ChatPlan:
        self._keeps = self._store.keeps(body)
        if body.previous_response_id is not None:
            previous = self._store.get(self._owner, body.previous_response_id, "previous_response_id")
            self._earlier, self._size = previous.items, previous.size
        given = body.input if isinstance(body.input, list) else [MessageItem(role="user", content=body.input)]
        self._given = self._store.resolved(self._owner, given)
        asked = await served.prepare(self._translated)
        plan = await chat.plan(served, asked, deadline)
        require_reasoning(body, begins_inside(plan.prompts[0]))
        return plan

    def _translated(self) -> ChatRequest:
        if self._keeps:
            self._size += len(encode(_ITEMS.dump_python(list(self._given))))
        return chat_request(self._body, self._earlier, self._given)

    def answer(
        self, served: ServedModel, body: ResponsesRequest, plan: chat.ChatPlan, job: RunningReplies
    ) -> ResponsesAnswer:
        return ResponsesAnswer(chat.ChatRun(served, plan, job), body, plan, self._keep)

    def _keep(self, response: dict[str, Any]) -> None:
        if not self._keeps:
            return
        output = _ITEMS.validate_python(response["output"])
        by_id = dict(zip((item["id"] for item in response["output"]), output, strict=True))
        items = (*self._earlier, *self._given, *output)
        self._store.put(Stored(self._owner, response, items, by_id, self._size + len(encode(response))))
