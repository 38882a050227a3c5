"""The bodies of requests.

``UNSUPPORTED`` has the options of OpenAI's API that this server does not implement. They are accepted if their value
changes nothing, and refused with a reason otherwise.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from glm4_runtime.server.effort import Effort, thinking_limit
from glm4_runtime.server.messages import Messages, Tools
from glm4_runtime.server.strict import Body, FunctionName, NonEmptyText, Unsupported

MOST_BIASED = 1024  # maximum tokens in logit_bias and in stop_token_ids
MOST_PROMPTS = 1024  # maximum list length; more than any server answers in one request

# Validation of a list stops at its first error; a body could contain a million.
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
ManyIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]


class Sampling(Body):
    """Options of both generating routes. Defaults come from the bundle's generation_config.json."""

    # also options of other servers, whose clients send their defaults
    UNSUPPORTED: ClassVar[Unsupported] = {
        "early_stopping": (False,),
        "length_penalty": (1,),
        "min_tokens": (0,),
        "num_beams": (1,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "use_beam_search": (False,),
    }

    model: NonEmptyText
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MOST_BIASED)] | None = None
    seed: int | None = None
    stop: NonEmptyText | Annotated[list[NonEmptyText], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_BIASED, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    user: str | None = Field(
        default=None, description="Whom the request is for; written to the server's log."
    )
    safety_identifier: str | None = Field(default=None, description="OpenAI's newer name of user.")

    @property
    def asked_by(self) -> str | None:
        return self.user or self.safety_identifier

    @property
    def has_form(self) -> bool:
        """Whether the reply has a prescribed format. Then a grammar is compiled, which may be slow."""
        return False


class StreamOptions(Body):
    UNSUPPORTED: ClassVar[Unsupported] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool | None = None
    include_timings: bool | None = None


class ChosenName(Body):
    name: FunctionName


class ChosenTool(Body):
    type: Literal["function"]
    function: ChosenName


ToolChoice = Literal["none", "auto", "required"] | ChosenTool


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    name: FunctionName
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(default=None, description="The schema is always enforced.")


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(Body):
    type: Literal["regex"]
    regex: NonEmptyText


class GrammarFormat(Body):
    type: Literal["grammar"]
    grammar: Annotated[str, Field(min_length=1, description="A Lark grammar as llguidance reads it.")]


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat,
    Field(discriminator="type"),
]


class ChatRequest(Sampling):
    UNSUPPORTED: ClassVar[Unsupported] = Sampling.UNSUPPORTED | {
        "add_generation_prompt": (True,),
        "audio": (),
        "continue_final_message": (False,),
        "function_call": (),
        "functions": (),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_retention": ("in_memory",),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    prompt_cache_key: str | None = Field(
        default=None, description="What prompts have in common is always kept."
    )
    thinking_budget: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Most tokens of the thinking before its closing tag."
    )

    reasoning_effort: Effort | None = None

    @property
    def thinking_limit(self) -> int | None:
        """Most tokens of the thinking; None: no limit."""
        return thinking_limit(self.reasoning_effort, self.thinking_budget)

    @property
    def has_form(self) -> bool:
        called = isinstance(self.tool_choice, ChosenTool) or self.tool_choice == "required"
        strict = any(tool.function.strict for tool in self.tools or ())
        return called or strict or self.response_format is not None or self.thinking_limit is not None


class CompletionRequest(Sampling):
    UNSUPPORTED: ClassVar[Unsupported] = Sampling.UNSUPPORTED | {"suffix": ("",), "best_of": (1,)}

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | TokenIds
        | ManyIds
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def has_form(self) -> bool:
        return self.response_format is not None


Inputs = (
    NonEmptyText
    | Annotated[list[NonEmptyText], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    | TokenIds
    | ManyIds
)


class EmbeddingRequest(Body):
    UNSUPPORTED: ClassVar[Unsupported] = {"dimensions": ()}

    model: NonEmptyText
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = Field(
        default=None, description="Whom the request is for; written to the server's log."
    )


class ClassifyRequest(Body):
    model: NonEmptyText
    input: Inputs
    user: str | None = Field(
        default=None, description="Whom the request is for; written to the server's log."
    )


class LoadAdapterRequest(Body):
    """vLLM's body."""

    lora_name: NonEmptyText = Field(max_length=200, description="The name of the new model.")
    lora_path: NonEmptyText = Field(
        max_length=4096, description="The adapter's folder on the server's machine."
    )


class UnloadAdapterRequest(Body):
    lora_name: NonEmptyText = Field(max_length=200)


class TokenizeRequest(Body):
    """Either a prompt, or messages to render by the chat template."""

    model: NonEmptyText | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is None and (self.tools or self.add_generation_prompt is not None):
            raise ValueError("tools and add_generation_prompt go with messages")
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens goes with prompt: a chat template writes its own")
        return self


class DetokenizeRequest(Body):
    model: NonEmptyText | None = None
    tokens: TokenIds
    skip_special_tokens: bool = False


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
