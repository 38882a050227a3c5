"""Finds out what a chat template does with each part of a conversation, by rendering marked conversations.

Templates differ in how they take earlier calls and results. Some drop system messages or tools silently.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm4_runtime.chat_template import ChatTemplate
from glm4_runtime.errors import BundleError, OvertimeError, RequestError

TemplateMessage = dict[str, Any]

# Marks that no template contains.
_SYSTEM, _QUESTION, _ANSWER, _NEXT = "zq1system", "zq2question", "zq3answer", "zq4next"
_NAME, _KEY, _VALUE, _RESULT, _TOOL = "zq5name", "zq6key", "zq7value", "zq8result", "zq9tool"
_ASKED = {"role": "user", "content": _QUESTION}
_OFFERED = {
    "type": "function",
    "function": {"name": _TOOL, "description": _TOOL, "parameters": {"type": "object", "properties": {}}},
}
# A function in a template's own text, such as {"name": "search", ...
_LISTED = re.compile(r"""["']name["']\s*:\s*["']([A-Za-z_][\w.-]*)["']""")


@dataclass(frozen=True)
class EarlierCall:
    """A call of an earlier turn; ``arguments`` is the text that the model wrote."""

    id: str
    name: str
    arguments: str

    @property
    def parsed(self) -> Any:
        try:
            return json.loads(self.arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the arguments of an earlier call are not JSON: {error}") from error


Shape = Callable[[Sequence[EarlierCall]], Iterator[TemplateMessage]]


def as_text(calls: Sequence[EarlierCall]) -> Iterator[TemplateMessage]:
    """tool_calls with arguments as text, as in OpenAI's API."""
    listed = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in calls
    ]
    yield {"role": "assistant", "content": "", "tool_calls": listed}


def as_objects(calls: Sequence[EarlierCall]) -> Iterator[TemplateMessage]:
    """tool_calls with arguments as an object, as in transformers."""
    listed = [{"type": "function", "function": {"name": c.name, "arguments": c.parsed}} for c in calls]
    yield {"role": "assistant", "content": "", "tool_calls": listed}


def as_metadata(calls: Sequence[EarlierCall]) -> Iterator[TemplateMessage]:
    """One message per call with the function in ``metadata``, as in the released GLM-4-0414 templates."""
    for call in calls:
        yield {"role": "assistant", "metadata": call.name, "content": call.arguments}


def as_content(calls: Sequence[EarlierCall]) -> Iterator[TemplateMessage]:
    """Calls as text, as GLM-Z1-Rumination writes them."""
    written = (
        f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments if call.arguments else "{}"}}}'
        for call in calls
    )
    yield {"role": "assistant", "content": "\n".join(written)}


_SHAPES: tuple[Shape, ...] = (as_text, as_metadata, as_objects)
_RESULT_ROLES = ("observation", "tool")


@dataclass(frozen=True)
class TemplateTraits:
    """
    Attributes:
        system: whether system messages reach the prompt.
        tools: whether definitions of tools reach the prompt.
        functions: names of functions that the template's own text lists.
        shape: how the template takes earlier calls; None if it cannot.
        enveloped: whether the model's calls are {"name": ..., "arguments": ...}, not a name and a newline.
        results: the role of a call's result; None if results do not reach the prompt.
        ends: names of the control tokens that follow an answer or a call, which end the model's turn.
    """

    system: bool
    tools: bool
    functions: frozenset[str]
    shape: Shape | None
    enveloped: bool
    results: str | None
    ends: tuple[str, ...]

    @property
    def dropped(self) -> list[str]:
        """The parts of a conversation that the template drops silently."""
        kinds = {"system messages": self.system, "tools": self.tools, "results of calls": self.results}
        return [kind for kind, reaches in kinds.items() if not reaches]


def traits_of(template: ChatTemplate, control_tokens: Collection[str]) -> TemplateTraits:
    """Render about ten marked conversations, and read the traits from the prompts.

    Raises :class:`BundleError` if the template takes too long.
    """
    rendered = _Renderer(template)
    own = rendered([_ASKED])
    tools = _TOOL in rendered([_ASKED], tools=[_OFFERED])
    functions = frozenset(_LISTED.findall(own)) if not tools else frozenset()
    shape = next((shape for shape in _SHAPES if _reaches(rendered, shape)), None)
    enveloped = not tools and shape is not None and (bool(functions) or _name_is_apart(rendered, shape))
    if enveloped and _reaches(rendered, as_content):
        shape = as_content
    results = next((role for role in _RESULT_ROLES if _RESULT in rendered(_called(shape, role))), None)
    return TemplateTraits(
        system=_SYSTEM in rendered([{"role": "system", "content": _SYSTEM}, _ASKED]),
        tools=tools,
        functions=functions,
        shape=shape,
        enveloped=enveloped,
        results=results,
        ends=_ends(rendered, shape, results, control_tokens),
    )


class _Renderer:
    """Renders prompts; an empty text if the template refuses the conversation."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        try:
            return self._template.render(messages, tools, add_generation_prompt=False)
        except OvertimeError as error:
            raise BundleError(f"the chat template cannot be used: {error}") from error
        except RequestError:
            return ""


def _call() -> EarlierCall:
    return EarlierCall("0", _NAME, json.dumps({_KEY: _VALUE}))


def _called(shape: Shape | None, result_role: str) -> list[TemplateMessage]:
    """A question, a call, its result, an answer, and another question."""
    calls = [] if shape is None else list(shape([_call()]))
    return [
        _ASKED,
        *calls,
        {"role": result_role, "content": _RESULT, "tool_call_id": "0"},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ]


def _reaches(rendered: _Renderer, shape: Shape) -> bool:
    """Whether a call in this shape reaches the prompt completely: its name, then its arguments."""
    _, named, rest = rendered([_ASKED, *shape([_call()])]).partition(_NAME)
    _, key, rest = rest.partition(_KEY)
    return bool(named) and bool(key) and _VALUE in rest


def _name_is_apart(rendered: _Renderer, shape: Shape) -> bool:
    """Whether there is white space between the name and its newline; models of the first form never write it."""
    rest = rendered([_ASKED, *shape([_call()])]).partition(_NAME)[2]
    return rest.partition("\n")[0] != "" and not rest.partition("\n")[0].strip()


def _ends(
    rendered: _Renderer, shape: Shape | None, results: str | None, control_tokens: Collection[str]
) -> tuple[str, ...]:
    """The first control tokens after an answer and after a call, except the one that begins an answer."""
    turns = rendered([_ASKED, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}])
    begins = _controls(_between(turns, _QUESTION, _ANSWER), control_tokens)[-1:]
    found = _controls(_between(turns, _ANSWER, _NEXT), control_tokens)[:1]
    if shape is not None and results is not None:
        found += _controls(_between(rendered(_called(shape, results)), _VALUE, _RESULT), control_tokens)[:1]
    return tuple(dict.fromkeys(name for name in found if name not in begins))


def _between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]


def _controls(text: str, control_tokens: Collection[str]) -> list[str]:
    """The names of control tokens in ``text``, in order."""
    if not control_tokens:
        return []
    names = sorted(control_tokens, key=len, reverse=True)
    return re.findall("|".join(map(re.escape, names)), text)
