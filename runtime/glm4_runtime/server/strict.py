"""The base of all request bodies: unknown options and values of a wrong type are refused."""

import difflib
import json
from collections.abc import Collection
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Maximum list length: more messages, parts or calls than fit any context.
MOST_PARTS = 16384

NonEmptyText = Annotated[str, Field(min_length=1)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]

# Option -> values that have no effect.
Unsupported = dict[str, tuple[Any, ...]]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    UNSUPPORTED: ClassVar[Unsupported] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_options(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        cls._refuse_unsupported(body)
        rest = {name: value for name, value in body.items() if name not in cls.UNSUPPORTED}
        if cls.model_config["extra"] == "forbid":
            cls._refuse_unknown(rest)
        return rest

    @classmethod
    def _refuse_unknown(cls, body: dict[str, Any]) -> None:
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in body:
            if name not in known:
                hint = _hint(name, known)
                # pydantic takes no half of a surrogate pair, which JSON may hold
                shown = name.encode("utf-8", "backslashreplace").decode()
                raise PydanticCustomError(
                    "unknown", "there is no such option{hint}", {"option": shown, "hint": hint}
                )

    @classmethod
    def _refuse_unsupported(cls, body: dict[str, Any]) -> None:
        for name, neutral in cls.UNSUPPORTED.items():
            value = body.get(name)
            if value is not None and not any(_same(value, other) for other in neutral):
                raise PydanticCustomError(
                    "unsupported",
                    "{option} is not implemented by this server; {advice}",
                    {"option": name, "advice": _advice(name, neutral)},
                )


def _same(value: Any, other: Any) -> bool:
    """Equality as in JSON, where true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _advice(name: str, neutral: tuple[Any, ...]) -> str:
    if name in _INSTEAD:
        return _INSTEAD[name]
    return f"leave it out or set it to {json.dumps(neutral[0])}" if neutral else "leave it out"


def _hint(name: str, known: Collection[str]) -> str:
    """A hint at the option that the client may have meant, if there is one."""
    for other in _OTHER_NAMES.get(name, ()):
        if other.partition(" ")[0].partition(".")[0] in known:
            return f"; use {other}"
    if name in _OTHER_ROUTES:
        return f"; {_OTHER_ROUTES[name]}"
    close = difflib.get_close_matches(name[:100], known, 1, 0.75)
    return f"; did you mean {close[0]}?" if close else ""


# Other servers' and routes' names for options of this server's routes.
_OTHER_NAMES = {
    "format": ("response_format", "output_config.format", "text.format"),
    "grammar": ("response_format of type grammar",),
    "guided_grammar": ("response_format of type grammar",),
    "guided_json": ("response_format of type json_schema",),
    "guided_regex": ("response_format of type regex",),
    "json_schema": ("response_format of type json_schema",),
    "instructions": ("system", "messages of role system"),
    "max_completion_tokens": ("max_tokens", "max_output_tokens"),
    "max_gen_toks": ("max_tokens", "max_output_tokens"),
    "max_length": ("max_tokens", "max_output_tokens"),
    "max_new_tokens": ("max_tokens", "max_output_tokens"),
    "max_output_tokens": ("max_tokens",),
    "max_tokens": ("max_output_tokens",),
    "n_predict": ("max_tokens", "max_output_tokens"),
    "num_predict": ("max_tokens", "max_output_tokens"),
    "num_return_sequences": ("n",),
    "random_seed": ("seed",),
    "regex": ("response_format of type regex",),
    "repeat_penalty": ("repetition_penalty",),
    "output_format": ("output_config.format", "text.format", "response_format"),
    "reasoning_effort": ("reasoning.effort",),
    "response_format": ("output_config.format", "text.format"),
    "stop": ("stop_sequences",),
    "stop_sequences": ("stop",),
    "system": ("messages of role system", "instructions"),
    "truncate_prompt_tokens": ("prompt of the length you want",),
}
_OTHER_ROUTES = {
    "input": "/v1/embeddings and /v1/classify take it",
    "messages": "POST messages to /v1/chat/completions",
    "prompt": "POST a prompt to /v1/completions",
}


# Old options of OpenAI's API, and their replacements.
_INSTEAD = {
    "functions": "describe functions by tools",
    "function_call": "use tools, tool_choice and tool_calls",
}
