"""Turns a request of the Messages API into a chat request."""

import json
from collections.abc import Sequence

from glm4_runtime.server import schema as chat_schema
from glm4_runtime.server.anthropic.schema import (
    AnyChoice,
    Conversation,
    InputMessage,
    MessagesRequest,
    NamedChoice,
    NoChoice,
    Text,
    ToolChoice,
    ToolDefinition,
    ToolResult,
    ToolUse,
)
from glm4_runtime.server.effort import require_effort
from glm4_runtime.server.errors import ApiError
from glm4_runtime.server.messages import FunctionDefinition, Message, Tool
from glm4_runtime.server.turns import Turns


def chat_request(body: MessagesRequest) -> chat_schema.ChatRequest:
    """The same request to the chat route. Raises :class:`ApiError` and :class:`RequestError`."""
    return chat_schema.ChatRequest(
        model=body.model,
        messages=messages_of(body),
        tools=tools_of(body),
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=False if getattr(body.tool_choice, "disable_parallel_tool_use", None) else None,
        response_format=_format(body),
        thinking_budget=None if body.thinking is None else body.thinking.budget_tokens,
        reasoning_effort=None if body.output_config is None else body.output_config.effort,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
    )


def require_thinking(body: Conversation, thinks: bool) -> None:
    """Raises :class:`ApiError` (400) if the model does not think as the request asks."""
    asked = body.thinking
    if asked is not None and (asked.type == "disabled") == thinks:
        does = "always thinks" if thinks else "does not think"
        raise ApiError(400, f"thinking.type is {asked.type!r}, but this model {does}", param="thinking")
    if body.output_config is not None:
        require_effort(body.output_config.effort, thinks, "high", "output_config.effort")


def messages_of(body: Conversation) -> list[Message]:
    turns = Turns()
    if body.system:
        turns.say("system", _text(body.system), "system")
    for index, message in enumerate(body.messages):
        _add(turns, message, f"messages[{index}]")
    return turns.messages()


def _add(turns: Turns, message: InputMessage, place: str) -> None:
    blocks = (
        [Text(type="text", text=message.content)] if isinstance(message.content, str) else message.content
    )
    texts = [block for block in blocks if isinstance(block, Text)]
    calls = [block for block in blocks if isinstance(block, ToolUse)]
    results = [block for block in blocks if isinstance(block, ToolResult)]
    for result in results:
        turns.answer(result.tool_use_id, _result(result), place)
    if texts or not (calls or results):
        turns.say(message.role, _text(texts), place)
    for call in calls:
        turns.call(call.id, call.name, _written(call, place), place)


def _written(call: ToolUse, place: str) -> str:
    try:
        return json.dumps(call.input, ensure_ascii=False)
    except RecursionError as error:
        raise ApiError(400, f"{place}: the input of {call.id!r} is nested too deeply") from error


def _text(given: str | Sequence[Text]) -> str:
    return given if isinstance(given, str) else "".join(block.text for block in given)


def _result(result: ToolResult) -> str:
    """The text of a result. The model is told of an error that has no text."""
    text = _text(result.content or "")
    return text or ("error" if result.is_error else "")


def tools_of(body: Conversation) -> list[Tool] | None:
    return None if body.tools is None else [_tool(tool) for tool in body.tools]


def _tool(tool: ToolDefinition) -> Tool:
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _choice(choice: ToolChoice | None) -> chat_schema.ToolChoice | None:
    if isinstance(choice, NamedChoice):
        return chat_schema.ChosenTool(type="function", function=chat_schema.ChosenName(name=choice.name))
    if isinstance(choice, NoChoice):
        return "none"
    return "required" if isinstance(choice, AnyChoice) else None


def _format(body: Conversation) -> chat_schema.JsonSchemaFormat | None:
    if body.output_config is None or body.output_config.format is None:
        return None
    named = chat_schema.NamedSchema(name="answer", schema=body.output_config.format.schema_)
    return chat_schema.JsonSchemaFormat(type="json_schema", json_schema=named)
