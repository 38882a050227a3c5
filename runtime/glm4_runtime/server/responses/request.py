"""Turns a request of the Responses API into a chat request."""

from collections.abc import Sequence

from glm4_runtime.server import schema as chat_schema
from glm4_runtime.server.effort import require_effort
from glm4_runtime.server.errors import ApiError
from glm4_runtime.server.messages import FunctionDefinition, TextPart, Tool
from glm4_runtime.server.responses.schema import (
    CallItem,
    ChosenFunction,
    FunctionTool,
    Item,
    JsonSchemaFormat,
    MessageItem,
    ResponsesRequest,
    ResultItem,
    ToolChoice,
)
from glm4_runtime.server.turns import Role, Turns

_ROLES: dict[str, Role] = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}


def chat_request(
    body: ResponsesRequest, earlier: Sequence[Item], given: Sequence[Item]
) -> chat_schema.ChatRequest:
    """The same request to the chat route. Raises :class:`ApiError` and :class:`RequestError`.

    Args:
        earlier: the conversation up to the response that the request continues.
        given: the items of this request.
    """
    if body.top_logprobs and not body.with_logprobs:
        raise ApiError(
            400, "top_logprobs goes with message.output_text.logprobs in include", param="top_logprobs"
        )
    turns = Turns()
    if body.instructions:
        turns.say("system", body.instructions, "instructions")
    for item in earlier:
        _add(turns, item, "previous_response_id")
    for index, item in enumerate(given):
        _add(turns, item, f"input[{index}]")
    return chat_schema.ChatRequest(
        model=body.model,
        messages=turns.messages(),
        tools=None if body.tools is None else [_tool(tool) for tool in body.tools],
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        logprobs=body.with_logprobs,
        top_logprobs=body.top_logprobs if body.with_logprobs else None,
    )


def require_reasoning(body: ResponsesRequest, thinks: bool) -> None:
    """Raises :class:`ApiError` (400) if the model does not think as the request asks."""
    if body.reasoning is not None:
        require_effort(body.reasoning.effort, thinks, "medium", "reasoning.effort")


def _add(turns: Turns, item: Item, place: str) -> None:
    """Add an item to the conversation. Reasoning does not go back to the model."""
    if isinstance(item, MessageItem):
        turns.say(_ROLES[item.role], _text(item.content), place)
    elif isinstance(item, CallItem):
        turns.call(item.call_id, item.name, item.arguments, place)
    elif isinstance(item, ResultItem):
        turns.answer(item.call_id, _text(item.output), place)


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tool(tool: FunctionTool) -> Tool:
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _choice(choice: ToolChoice | None) -> chat_schema.ToolChoice | None:
    if isinstance(choice, ChosenFunction):
        return chat_schema.ChosenTool(type="function", function=chat_schema.ChosenName(name=choice.name))
    return choice


def _format(body: ResponsesRequest) -> chat_schema.ResponseFormat | None:
    asked = None if body.text is None else body.text.format
    if not isinstance(asked, JsonSchemaFormat):
        return asked
    named = chat_schema.NamedSchema(name=asked.name, schema=asked.schema_)
    return chat_schema.JsonSchemaFormat(type="json_schema", json_schema=named)
