"""The messages and tools of a conversation, as clients send them.

Messages, calls and parts that clients send back may contain fields that their libraries added: see :class:`Echoed`.
Validation of a list stops at its first error; a body could contain a million.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from glm4_runtime.server.strict import MOST_PARTS, Body, FunctionName, NonEmptyText, Unsupported


class Echoed(Body):
    """A part of an earlier answer that the client sends back. Fields that its libraries added are dropped."""

    model_config = ConfigDict(strict=True, extra="ignore")


# Types of parts that are thinking and not the answer; and types of parts with text, with the key of the text.
_THOUGHTS = ("thinking", "reasoning", "redacted_thinking")
_TEXT_OF = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class TextPart(Echoed):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _read_other_types(cls, part: Any) -> Any:
        if not isinstance(part, dict) or not isinstance(kind := part.get("type"), str):
            return part
        if kind in _THOUGHTS:
            return {"type": "text", "text": ""}
        if kind not in _TEXT_OF:
            raise PydanticCustomError(
                "part",
                "this model reads text only, and no part of type {kind}; send parts as {shape}",
                {"kind": repr(kind[:40]), "shape": _TEXT_PART},
            )
        return {"type": "text", "text": part.get(_TEXT_OF[kind])} if _TEXT_OF[kind] in part else part


_TEXT_PART = '{"type": "text", "text": "..."}'

Parts = Annotated[list[TextPart], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]


def written_arguments(arguments: Any) -> Any:
    """Arguments as text. Some clients send them parsed, or null for none."""
    if isinstance(arguments, dict):
        return json.dumps(arguments, ensure_ascii=False)
    return "{}" if isinstance(arguments, str) and not arguments.strip() else arguments


class CalledFunction(Echoed):
    name: FunctionName
    arguments: Annotated[str, BeforeValidator(written_arguments)]


class Call(Echoed):
    id: NonEmptyText
    type: Literal["function"] = "function"
    function: CalledFunction


# Fields that describe a message and are not part of it. Clients and frameworks add them.
_ABOUT_A_MESSAGE = frozenset(
    (
        "additional_kwargs",
        "annotations",
        "artifact",
        "cache_control",
        "created",
        "created_at",
        "id",
        "index",
        "is_error",
        "metadata",
        "model",
        "object",
        "provider_specific_fields",
        "response_metadata",
        "status",
        "timestamp",
        "tool_name",
        "type",
        "usage",
        "usage_metadata",
    )
)


class EchoedMessage(Body):
    """A message. An assistant's is an earlier answer: its unknown fields are dropped. Of others, descriptions are."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_was_added(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        if message.get("role") == "assistant":
            kept = cls.model_fields.keys() | cls.UNSUPPORTED.keys()
            return {name: value for name, value in message.items() if name in kept}
        return {name: value for name, value in message.items() if name not in _ABOUT_A_MESSAGE}


class Message(EchoedMessage):
    """One turn. ``observation`` is GLM-4's own name for ``tool``.

    Attributes:
        place: where the client wrote the message, for errors, if it did not write it in this form.
    """

    # these would change the prompt
    UNSUPPORTED: ClassVar[Unsupported] = {
        "audio": (),
        "files": ([],),
        "function_call": (),
        "images": ([],),
        "partial": (False,),
        "prefix": (False,),
        "videos": ([],),
    }

    role: Literal["system", "developer", "user", "assistant", "tool", "observation"]
    content: str | Parts | None = None
    name: str | None = None
    tool_calls: Annotated[list[Call], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = Field(default=None, description="An assistant's text where content is null.")
    reasoning_content: str | None = Field(
        default=None, description="Left out: thoughts don't go back into history."
    )
    _place: str | None = PrivateAttr(None)

    @property
    def place(self) -> str | None:
        return self._place

    def at(self, place: str) -> "Message":
        """This message, with the place where the client wrote it."""
        self._place = place
        return self

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Message":
        if self.role != "assistant":
            if self.content is None:
                raise ValueError(f"a message of role {self.role} needs content")
            if self.tool_calls or self.reasoning_content or self.refusal:
                raise ValueError(
                    f"a message of role {self.role} has neither tool_calls nor reasoning_content nor refusal"
                )
        elif self.content is None:
            self.content = self.refusal
        if self.tool_call_id is not None and self.role not in ("tool", "observation"):
            raise ValueError(f"a message of role {self.role} has no tool_call_id")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role tool needs the tool_call_id that it answers")
        return self


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]


class FunctionDefinition(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    UNSUPPORTED: ClassVar[Unsupported] = {
        "cache_control": ({"type": "ephemeral"},)
    }  # what prompts have in common is always kept

    type: Literal["function"]
    function: FunctionDefinition


Tools = Annotated[list[Tool], Field(max_length=MOST_PARTS, fail_fast=True)]
