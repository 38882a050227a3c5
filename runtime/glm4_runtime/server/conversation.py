"""Turns messages of the API into messages for the checkpoint's template. Templates differ."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from glm4_runtime.chat_template import ChatTemplate
from glm4_runtime.errors import RequestError
from glm4_runtime.prompts import Prompt
from glm4_runtime.reasoning import without_thoughts
from glm4_runtime.server.messages import Call, Message, Tool
from glm4_runtime.template_traits import EarlierCall, TemplateMessage, traits_of


class Conversation:
    """A chat template and its ``traits``: what it does with each part of a conversation."""

    def __init__(self, template: ChatTemplate, control_tokens: Collection[str] = ()) -> None:
        self._template, self._control_tokens = template, control_tokens
        self.traits = traits_of(template, control_tokens)
        self._own_text: str | None = None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Render the prompt. Raises :class:`RequestError` if the template or its format cannot express the messages,
        or would drop a part."""
        self._require_tools(tools)
        history = list(self._history(messages))
        return self._template.prompt(
            history, tools or None, add_generation_prompt, control_tokens=self._control_tokens
        )

    def _require_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Check that the model can know each function: from its definition, or from the template's own text."""
        if not tools or self.traits.tools:
            return
        if self._own_text is None:
            self._own_text = self._template.render([{"role": "user", "content": ""}])
        names = [str(tool.get("function", tool).get("name")) for tool in tools]
        unknown = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", self._own_text)]
        if unknown:
            own = ", ".join(sorted(self.traits.functions))
            raise RequestError(
                f"this model's chat template does not show tools to the model, so that {unknown[0]!r} is unknown to it; "
                + (
                    f"its own functions are: {own}"
                    if own
                    else "leave tools out, or describe them in a message"
                )
            )

    def _history(self, messages: Sequence[Message]) -> Iterator[TemplateMessage]:
        position = 0
        while position < len(messages):
            message = messages[position]
            position += 1
            if message.role in ("tool", "observation"):
                if message.tool_call_id is not None:
                    raise RequestError(
                        f"{_place(messages, position - 1)} answers the call {message.tool_call_id!r}, but does not follow "
                        "an assistant's message with that call"
                    )
                yield self._result(message)
            elif message.role == "assistant" and message.tool_calls:
                results, position = _results(messages, position, message.tool_calls)
                yield from self._called(message, message.tool_calls)
                yield from map(self._result, results)
            elif message.role == "assistant":
                yield _turn("assistant", message) | {"content": without_thoughts(_text(message))}
            elif message.role == "user":
                yield _turn("user", message)
            elif self.traits.system:
                yield _turn("system", message)
            else:
                raise RequestError(
                    f"{_place(messages, position - 1)}: this model's chat template drops system messages; "
                    "say it in the first message of role user"
                )

    def _result(self, message: Message) -> TemplateMessage:
        if self.traits.results is None:
            raise RequestError("this model's chat template drops the results of tool calls")
        return _turn(self.traits.results, message)

    def _called(self, message: Message, calls: Sequence[Call]) -> Iterator[TemplateMessage]:
        if self.traits.shape is None:
            raise RequestError("this model's chat template has no way to write earlier tool calls")
        said = without_thoughts(_text(message))
        earlier = [EarlierCall(call.id, call.function.name, call.function.arguments) for call in calls]
        rendered = list(self.traits.shape(earlier))
        if said and "tool_calls" in rendered[0]:
            rendered[0] = rendered[0] | {"content": said}
        elif said:
            yield {"role": "assistant", "content": said}
        yield from rendered


def definitions(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as the model sees them, without ``strict``, which is for the server."""
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def _results(messages: Sequence[Message], start: int, calls: Sequence[Call]) -> tuple[list[Message], int]:
    """The results after a message with calls, in the order of the calls, because the format has no ids."""
    expected = [call.id for call in calls]
    if len(set(expected)) < len(expected):
        raise RequestError(f"{_place(messages, start - 1)} has calls with the same id")
    found: dict[str, Message] = {}
    position = start
    while position < len(messages) and messages[position].role in ("tool", "observation"):
        message = messages[position]
        key = message.tool_call_id
        if key is None and len(found) < len(
            expected
        ):  # GLM-4's own role; results are in the order of the calls
            key = expected[len(found)]
        if key not in expected or key in found:
            raise RequestError(
                f"{_place(messages, position)} answers the call {key!r}, which is not open: {', '.join(expected)}"
            )
        found[key] = message
        position += 1
    missing = [key for key in expected if key not in found]
    if missing:
        raise RequestError(
            f"{_place(messages, start - 1)} calls tools, but no message answers: {', '.join(missing)}"
        )
    return [found[key] for key in expected], position


def _turn(role: str, message: Message) -> TemplateMessage:
    turn = {"role": role, "content": _text(message)}
    return turn | ({"name": message.name} if message.name is not None else {})


def _text(message: Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


def _place(messages: Sequence[Message], position: int) -> str:
    return messages[position].place or f"messages[{position}]"
