"""The bodies of requests. A field that is not here is refused, and so is a value of another type.

Options of OpenAI's API that this server does not implement are in ``UNSUPPORTED``: they are accepted where their
value asks for what happens anyway, and refused with a reason otherwise.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Lists stop at their first wrong member: a body of a million wrong ones would be as many errors.
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Ids = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
ManyIds = Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


MOST_BIASED = 1024  # tokens of logit_bias, and of stop_token_ids


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    # option -> values that change nothing
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in cls.UNSUPPORTED.items():
            if name in body and body[name] is not None and body[name] not in neutral:
                raise PydanticCustomError(
                    "unsupported",
                    "{option} is not implemented by this server; leave it out",
                    {"option": name},
                )
        return {name: value for name, value in body.items() if name not in cls.UNSUPPORTED}


class Sampling(Body):
    """What both ways to generate have in common. Defaults come from the bundle's generation_config.json."""

    model: Text
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
    stop: Text | Annotated[list[Text], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_BIASED, fail_fast=True)] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    user: str | None = Field(None, description="Whom the request is for; written to the server's log.")

    @property
    def has_form(self) -> bool:
        """Whether the form of the reply is prescribed: then a grammar is compiled, which may take long."""
        return False


class StreamOptions(Body):
    include_usage: bool = False


class TextPart(Body):
    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


class CalledFunction(Body):
    name: FunctionName
    arguments: str


class Call(Body):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn. ``observation`` is GLM-4's own name for ``tool``."""

    UNSUPPORTED = {"refusal": (), "audio": (), "function_call": (), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant", "tool", "observation"]
    content: str | Parts | None = None
    name: str | None = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="Left out: thoughts don't go back into history.")

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Message":
        if self.role != "assistant":
            if self.content is None:
                raise ValueError(f"a message of role {self.role} needs content")
            if self.tool_calls or self.reasoning_content:
                raise ValueError(
                    f"a message of role {self.role} has neither tool_calls nor reasoning_content"
                )
        if self.tool_call_id is not None and self.role not in ("tool", "observation"):
            raise ValueError(f"a message of role {self.role} has no tool_call_id")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role tool needs the tool_call_id that it answers")
        return self


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class FunctionDefinition(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


Tools = Annotated[list[Tool], Field(fail_fast=True)]


class ChosenName(Body):
    name: FunctionName


class ChosenTool(Body):
    type: Literal["function"]
    function: ChosenName


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    name: FunctionName
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(None, description="The schema is always enforced.")


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(Body):
    type: Literal["regex"]
    regex: Text


class GrammarFormat(Body):
    type: Literal["grammar"]
    grammar: Annotated[str, Field(min_length=1, description="A Lark grammar as llguidance reads it.")]


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat,
    Field(discriminator="type"),
]


class ChatRequest(Sampling):
    UNSUPPORTED = {
        "audio": (),
        "function_call": (),
        "functions": (),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_cache_retention": ("in_memory",),
        "reasoning_effort": (),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def has_form(self) -> bool:
        called = isinstance(self.tool_choice, ChosenTool) or self.tool_choice == "required"
        strict = any(tool.function.strict for tool in self.tools or ())
        return called or strict or self.response_format is not None


class CompletionRequest(Sampling):
    UNSUPPORTED = {"suffix": ("",), "best_of": (1,)}

    prompt: str | Annotated[list[str], Field(min_length=1, fail_fast=True)] | Ids | ManyIds
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def has_form(self) -> bool:
        return self.response_format is not None


Inputs = Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)] | Ids | ManyIds


class EmbeddingRequest(Body):
    UNSUPPORTED = {"dimensions": ()}

    model: Text
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = Field(None, description="Whom the request is for; written to the server's log.")


class ClassifyRequest(Body):
    model: Text
    input: Inputs
    user: str | None = Field(None, description="Whom the request is for; written to the server's log.")


class TokenizeRequest(Body):
    """Either a prompt, or messages to render by the chat template."""

    model: Text | None = None
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
    model: Text | None = None
    tokens: Ids
    skip_special_tokens: bool = False


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
