"""The body of a request to the Responses API, and the items of a conversation."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from glm4_runtime.server.effort import Effort
from glm4_runtime.server.messages import Echoed, EchoedMessage, Parts, written_arguments
from glm4_runtime.server.schema import JsonObjectFormat, TextFormat
from glm4_runtime.server.strict import MOST_PARTS, Body, FunctionName, NonEmptyText, Unsupported


class MessageItem(EchoedMessage):
    UNSUPPORTED: ClassVar[Unsupported] = {"phase": ("commentary", "final_answer")}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts


class CallItem(Echoed):
    UNSUPPORTED: ClassVar[Unsupported] = {"async": (False,), "caller": ({"type": "direct"},), "namespace": ()}

    type: Literal["function_call"]
    call_id: NonEmptyText
    name: FunctionName
    arguments: Annotated[str, BeforeValidator(written_arguments)]


class ResultItem(Echoed):
    UNSUPPORTED: ClassVar[Unsupported] = {"caller": ({"type": "direct"},), "namespace": ()}

    type: Literal["function_call_output"]
    call_id: NonEmptyText
    output: str | Parts


class ReasoningItem(Echoed):
    """Thinking of an earlier answer. It does not go back to the model."""

    type: Literal["reasoning"]


class ReferenceItem(Echoed):
    """An item of a stored response."""

    type: Literal["item_reference"]
    id: NonEmptyText


_KNOWN = {"message", "function_call", "function_call_output", "reasoning", "item_reference"}


def _require_known(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    kind = item.get("type")
    if kind is None and "role" in item:
        return item | {"type": "message"}
    if isinstance(kind, str) and kind not in _KNOWN:
        raise PydanticCustomError(
            "item",
            "this server has no items of type {kind}; it takes {known}",
            {"kind": repr(kind[:40]), "known": ", ".join(sorted(_KNOWN))},
        )
    return item


Item = Annotated[
    Annotated[
        MessageItem | CallItem | ResultItem | ReasoningItem | ReferenceItem, Field(discriminator="type")
    ],
    BeforeValidator(_require_known),
]


class FunctionTool(Body):
    """A function that the client runs."""

    UNSUPPORTED: ClassVar[Unsupported] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def _require_function(tool: Any) -> Any:
    if isinstance(tool, dict) and isinstance(kind := tool.get("type"), str) and kind != "function":
        raise PydanticCustomError(
            "tool",
            "this server runs no tools, and has none of type {kind}; describe tools of yours with type function",
            {"kind": repr(kind[:40])},
        )
    return tool


class ChosenFunction(Body):
    type: Literal["function"]
    name: FunctionName


def _require_function_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and isinstance(kind := choice.get("type"), str) and kind != "function":
        raise PydanticCustomError(
            "choice",
            "no choice of type {kind} is implemented; choose auto, none, required or one function by its name",
            {"kind": repr(kind[:40])},
        )
    return choice


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | ChosenFunction, BeforeValidator(_require_function_choice)
]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    name: FunctionName
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(default=None, description="The schema is always enforced.")


class TextConfig(Body):
    UNSUPPORTED: ClassVar[Unsupported] = {"verbosity": ("medium",)}

    format: (
        Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None
    ) = None


class Reasoning(Body):
    """How the model thinks. The chat template decides whether it thinks."""

    UNSUPPORTED: ClassVar[Unsupported] = {"context": ("auto",), "mode": ("standard",)}

    effort: Effort | None = None
    summary: Literal["auto", "detailed"] | None = None
    generate_summary: Literal["auto", "detailed"] | None = None


class StreamOptions(Body):
    UNSUPPORTED: ClassVar[Unsupported] = {"include_obfuscation": (False,)}


ENCRYPTED, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"


class ResponsesRequest(Body):
    UNSUPPORTED: ClassVar[Unsupported] = {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "moderation": (),
        "prompt": (),
        "prompt_cache_options": ({}, {"mode": "implicit"}),
        "prompt_cache_retention": ("in_memory",),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
    }

    model: NonEmptyText
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]
    instructions: str | None = None
    previous_response_id: NonEmptyText | None = None
    store: bool | None = Field(default=None, description="By default true, if the server stores responses.")
    client_metadata: dict[str, Any] | None = Field(
        default=None, description="What a client tells of itself. It changes nothing."
    )
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Of tools that the server runs; this server runs none."
    )
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = Field(
        default=None, description="What prompts have in common is always kept."
    )
    reasoning: Reasoning | None = None
    safety_identifier: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    text: TextConfig | None = None
    tool_choice: ToolChoice | None = None
    tools: (
        Annotated[
            list[Annotated[FunctionTool, BeforeValidator(_require_function)]],
            Field(max_length=MOST_PARTS, fail_fast=True),
        ]
        | None
    ) = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    top_p: float | None = None
    user: str | None = Field(
        default=None, description="Whom the request is for; written to the server's log."
    )

    @field_validator("metadata")
    @classmethod
    def _is_short(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        if any(len(name) > 64 or len(value) > 512 for name, value in (metadata or {}).items()):
            raise ValueError("a name has at most 64 characters, and a value at most 512")
        return metadata

    @property
    def asked_by(self) -> str | None:
        return self.user or self.safety_identifier

    @property
    def with_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def with_summary(self) -> bool:
        asked = self.reasoning or Reasoning()
        return (asked.summary or asked.generate_summary) is not None
