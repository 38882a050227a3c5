"""The bodies of Anthropic's Messages API. As in the chat route, unknown fields of blocks are dropped."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from glm4_runtime.server.effort import Effort
from glm4_runtime.server.messages import Echoed, EchoedMessage
from glm4_runtime.server.strict import MOST_PARTS, Body, FunctionName, NonEmptyText, Unsupported


class CacheControl(Body):
    """Prefixes of prompts are always cached, so that this option changes nothing."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Text(Echoed):
    type: Literal["text"]
    text: str


class ToolUse(Echoed):
    type: Literal["tool_use"]
    id: NonEmptyText
    name: FunctionName
    input: dict[str, Any]


class Thinking(Echoed):
    """Thinking of an earlier answer. It does not go back to the model."""

    type: Literal["thinking", "redacted_thinking"]


_KNOWN = {"text", "tool_use", "tool_result", "thinking", "redacted_thinking"}


def _require_known(block: Any) -> Any:
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind not in _KNOWN:
        raise PydanticCustomError(
            "block",
            "this model reads text only, and no block of type {kind}; send blocks as {shape}",
            {"kind": repr(kind[:40]), "shape": '{"type": "text", "text": "..."}'},
        )
    return block


TextBlock = Annotated[Text, BeforeValidator(_require_known)]
Texts = Annotated[list[TextBlock], Field(max_length=MOST_PARTS, fail_fast=True)]


class ToolResult(Echoed):
    type: Literal["tool_result"]
    tool_use_id: NonEmptyText
    content: str | Texts | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[Text | ToolUse | ToolResult | Thinking, Field(discriminator="type")],
    BeforeValidator(_require_known),
]
Blocks = Annotated[list[Block], Field(max_length=MOST_PARTS, fail_fast=True)]

_BLOCKS_OF_ROLE: dict[str, tuple[type[Echoed], ...]] = {
    "user": (Text, ToolResult),
    "assistant": (Text, ToolUse, Thinking),
    "system": (Text,),
}


class InputMessage(EchoedMessage):
    role: Literal["user", "assistant", "system"]
    content: str | Blocks

    @model_validator(mode="after")
    def _has_blocks_of_its_role(self) -> "InputMessage":
        if not self.content and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} needs content")
        seen_text = False
        for block in self.content if isinstance(self.content, list) else ():
            if not isinstance(block, _BLOCKS_OF_ROLE[self.role]):
                raise ValueError(f"a message of role {self.role} has no block of type {block.type}")
            if isinstance(block, ToolResult) and seen_text:
                raise ValueError("blocks of type tool_result come before the text of a message")
            seen_text = seen_text or isinstance(block, Text)
        return self


class ToolDefinition(Body):
    """A function that the client runs."""

    UNSUPPORTED: ClassVar[Unsupported] = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "eager_input_streaming": (True,),
        "input_examples": ([],),
    }

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_tools_of_the_server(cls, tool: Any) -> Any:
        if isinstance(tool, dict) and isinstance(kind := tool.get("type"), str) and kind != "custom":
            raise PydanticCustomError(
                "tool",
                "this server runs no tools, and has none of type {kind}; describe a tool of yours by name and "
                "input_schema",
                {"kind": repr(kind[:40])},
            )
        return tool


class AutoChoice(Body):
    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Body):
    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Body):
    type: Literal["tool"]
    name: FunctionName
    disable_parallel_tool_use: bool | None = None


class NoChoice(Body):
    type: Literal["none"]


ToolChoice = Annotated[AutoChoice | AnyChoice | NamedChoice | NoChoice, Field(discriminator="type")]


class Thinks(Body):
    """How the model thinks. The chat template decides whether it thinks."""

    type: Literal["adaptive", "enabled", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _has_a_budget(self) -> "Thinks":
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise ValueError("budget_tokens goes with type enabled, and type enabled needs it")
        return self


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: OutputFormat | None = None
    effort: Effort | None = None


class Metadata(Body):
    user_id: str | None = Field(
        default=None, description="Whom the request is for; written to the server's log."
    )


class Conversation(Body):
    """The options that decide a prompt."""

    UNSUPPORTED: ClassVar[Unsupported] = {
        "container": (),
        "context_management": ({}, {"edits": []}),
        "inference_geo": (),
        "mcp_servers": ([],),
        "speed": ("standard",),
    }

    model: NonEmptyText
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]
    system: str | Texts | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinks | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    @field_validator("messages")
    @classmethod
    def _end_with_a_question(cls, messages: list[InputMessage]) -> list[InputMessage]:
        if messages[-1].role == "assistant":
            raise ValueError(
                "the last message is the assistant's, but this server does not continue an answer; end with a message "
                "of role user"
            )
        return messages


class CountRequest(Conversation):
    """A conversation whose tokens are counted."""


class MessagesRequest(Conversation):
    UNSUPPORTED: ClassVar[Unsupported] = Conversation.UNSUPPORTED | {
        "diagnostics": (),
        "service_tier": ("auto", "standard_only"),
    }

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[NonEmptyText], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None

    @property
    def asked_by(self) -> str | None:
        return None if self.metadata is None else self.metadata.user_id
