"""Messages of the API as messages of the checkpoint's own template, which differ from one to the next."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm4_runtime.chat import ChatTemplate
from glm4_runtime.errors import RequestError
from glm4_runtime.reasoning import without_thoughts
from glm4_runtime.server.messages import Call, Message, Tool

_NAME, _KEY, _VALUE = "probe_name", "probe_key", "probe_value"
_ARGUMENTS = json.dumps({_KEY: _VALUE})
_ASKED = {"role": "user", "content": "?"}

# The tokens that begin a turn: in a message they would let its author speak for another role.
TURN_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

TemplateMessage = dict[str, Any]


def _as_text(calls: Sequence[Call]) -> Iterator[TemplateMessage]:
    """tool_calls whose arguments are a text, as OpenAI has them."""
    listed = [
        {"id": c.id, "type": c.type, "function": {"name": c.function.name, "arguments": c.function.arguments}}
        for c in calls
    ]
    yield {"role": "assistant", "content": "", "tool_calls": listed}


def _as_objects(calls: Sequence[Call]) -> Iterator[TemplateMessage]:
    """tool_calls whose arguments are an object, as transformers has them."""
    listed = [
        {"type": c.type, "function": {"name": c.function.name, "arguments": _parsed(c.function.arguments)}}
        for c in calls
    ]
    yield {"role": "assistant", "content": "", "tool_calls": listed}


def _as_metadata(calls: Sequence[Call]) -> Iterator[TemplateMessage]:
    """One message per call, its function in ``metadata``, as the released GLM-4-0414 templates have them."""
    for call in calls:
        yield {
            "role": "assistant",
            "metadata": call.function.name,
            "content": call.function.arguments,
        }


_SHAPES = (_as_text, _as_metadata, _as_objects)


class Conversation:
    """A chat template, and how it wants earlier calls; found out by rendering one."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._shape = next((shape for shape in _SHAPES if _renders(template, shape)), None)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt. Raises :class:`RequestError` for what the template or its format cannot say."""
        history = list(self._history(messages))
        _refuse_turn_tokens("tools", tools)
        for turn in history:  # as the template gets it: parts joined, arguments of calls parsed
            _refuse_turn_tokens(f"a message of role {turn['role']}", turn)
        return self._template.render(history, tools or None, add_generation_prompt)

    def _history(self, messages: Sequence[Message]) -> Iterator[TemplateMessage]:
        position = 0
        while position < len(messages):
            message = messages[position]
            position += 1
            if message.role in ("tool", "observation"):
                if message.tool_call_id is not None:
                    raise RequestError(
                        f"messages[{position - 1}] answers the call {message.tool_call_id!r}, but does not follow "
                        "an assistant's message with that call"
                    )
                yield _turn("observation", message)
            elif message.role == "assistant" and message.tool_calls:
                results, position = _results(messages, position, message.tool_calls)
                yield from self._called(message, message.tool_calls)
                yield from results
            elif message.role == "assistant":
                yield _turn("assistant", message) | {"content": without_thoughts(_text(message))}
            else:
                yield _turn("system" if message.role == "developer" else message.role, message)

    def _called(self, message: Message, calls: Sequence[Call]) -> Iterator[TemplateMessage]:
        if self._shape is None:
            raise RequestError("this model's chat template has no way to write earlier tool calls")
        said = without_thoughts(_text(message))
        rendered = list(self._shape(calls))
        if said and "tool_calls" in rendered[0]:
            rendered[0] = rendered[0] | {"content": said}
        elif said:
            yield {"role": "assistant", "content": said}
        yield from rendered


def definitions(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as the model is shown them; ``strict`` is meant for the server."""
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def _renders(template: ChatTemplate, shape: Any) -> bool:
    call = Call.model_validate({"id": "0", "function": {"name": _NAME, "arguments": _ARGUMENTS}})
    try:
        text = template.render([_ASKED, *shape([call])], add_generation_prompt=False)
    except RequestError:
        return False
    _, named, rest = text.partition(f"{_NAME}\n")
    return bool(named) and rest.lstrip().startswith("{") and _KEY in rest and _VALUE in rest


def _results(
    messages: Sequence[Message], start: int, calls: Sequence[Call]
) -> tuple[list[TemplateMessage], int]:
    """The results that follow a message with calls, in the order of the calls: the format has no ids."""
    expected = [call.id for call in calls]
    if len(set(expected)) < len(expected):
        raise RequestError(f"messages[{start - 1}].tool_calls has one id twice")
    found: dict[str, TemplateMessage] = {}
    position = start
    while position < len(messages) and messages[position].role in ("tool", "observation"):
        message = messages[position]
        key = message.tool_call_id
        if key is None and len(found) < len(expected):  # GLM-4's own role: results in the order of the calls
            key = expected[len(found)]
        if key not in expected or key in found:
            raise RequestError(
                f"messages[{position}] answers the call {key!r}, which is not open: {', '.join(expected)}"
            )
        found[key] = _turn("observation", message)
        position += 1
    missing = [key for key in expected if key not in found]
    if missing:
        raise RequestError(f"messages[{start - 1}] calls tools, but no message answers: {', '.join(missing)}")
    return [found[key] for key in expected], position


def _turn(role: str, message: Message) -> TemplateMessage:
    turn = {"role": role, "content": _text(message)}
    return turn | ({"name": message.name} if message.name is not None else {})


def _text(message: Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the arguments of an earlier call are not JSON: {error}") from error


def _texts(value: Any) -> Iterator[str]:
    """Every text within a value as JSON has them, names of members too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield name
            yield from _texts(member)
    elif isinstance(value, Sequence):
        for member in value:
            yield from _texts(member)


def _refuse_turn_tokens(where: str, said: Any) -> None:
    found = next((token for text in _texts(said) for token in TURN_TOKENS if token in text), None)
    if found is not None:
        raise RequestError(
            f"{where} holds {found!r}, which begins a turn in this model's format; write it in another way"
        )
