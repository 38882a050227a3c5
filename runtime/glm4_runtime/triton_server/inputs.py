"""Reads the tensors and parameters of a request to Triton.

The names are those of Triton's vLLM backend, so that its clients work unchanged. ``messages`` is ours: a conversation,
rendered by the bundle's chat template.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm4_runtime.errors import RequestError, shown
from glm4_runtime.sampling import SamplingParams

ROLES = ("system", "user", "assistant")
# Sampling parameters of a request. Clients of the vLLM backend send numbers as strings.
SAMPLING_FIELDS = tuple(SamplingParams.__dataclass_fields__)


@dataclass(frozen=True)
class TritonRequest:
    """One request.

    Attributes:
        text: the prompt; None if ``messages`` is given.
        stream: whether each token is a response; otherwise the whole answer is one.
        echo: whether the answer begins with the prompt.
        sampling: values of :class:`SamplingParams`.
    """

    text: str | None
    messages: list[dict[str, str]] | None
    stream: bool
    echo: bool
    sampling: Mapping[str, Any]


def read_request(request: Any, triton: Any) -> TritonRequest:
    """The request's meaning.

    Args:
        triton: the module ``triton_python_backend_utils``.

    Raises:
        RequestError: an input is missing, has another shape, or a value is not allowed.
    """
    text, messages = _text(request, triton, "text_input"), _text(request, triton, "messages")
    if (text is None) == (messages is None):
        raise RequestError("give either text_input or messages, one string each")
    stream = _flag(request, triton, "stream", False)
    echo = not _flag(request, triton, "exclude_input_in_output", True)
    if echo and stream:
        raise RequestError("exclude_input_in_output must be true in a stream")
    if echo and messages is not None:
        raise RequestError("exclude_input_in_output must be true with messages")
    sampling = _object("parameters", request.parameters() or "{}")
    sampling |= _object("sampling_parameters", _text(request, triton, "sampling_parameters") or "{}")
    return TritonRequest(
        text, None if messages is None else _messages(messages), stream, echo, _sampling(sampling)
    )


def texts(request: Any, triton: Any) -> list[str]:
    """All strings of ``text_input``, for a classifier or an encoder."""
    return [_decoded("text_input", each) for each in _values(request, triton, "text_input")]


def _values(request: Any, triton: Any, name: str) -> list[Any]:
    tensor = triton.get_input_tensor_by_name(request, name)
    return [] if tensor is None else list(np.asarray(tensor.as_numpy()).reshape(-1))


def _one(request: Any, triton: Any, name: str) -> Any:
    values = _values(request, triton, name)
    if len(values) > 1:
        raise RequestError(f"{name} holds {len(values)} values; send one per request")
    return values[0] if values else None


def _text(request: Any, triton: Any, name: str) -> str | None:
    value = _one(request, triton, name)
    return None if value is None else _decoded(name, value)


def _decoded(name: str, value: Any) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error


def _flag(request: Any, triton: Any, name: str, default: bool) -> bool:
    value = _one(request, triton, name)
    return default if value is None else bool(value)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is not JSON: {error}") from error


def _object(name: str, text: str) -> dict[str, Any]:
    found = _json(name, text)
    if not isinstance(found, dict):
        raise RequestError(f"{name} must be a JSON object, not {shown(found)}")
    return found


def _messages(text: str) -> list[dict[str, str]]:
    found = _json("messages", text)
    if not isinstance(found, list) or not found:
        raise RequestError('messages must be a list such as [{"role": "user", "content": "..."}]')
    for number, one in enumerate(found):
        fits = isinstance(one, dict) and one.keys() == {"role", "content"}
        if not fits or one["role"] not in ROLES or not isinstance(one["content"], str):
            raise RequestError(
                f"messages[{number}] must have a role ({', '.join(ROLES)}) and a content, a string: {shown(one)}"
            )
    return found


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(given.keys() - set(SAMPLING_FIELDS))
    if unknown:
        raise RequestError(
            f"{shown(unknown[0])} is no sampling parameter; known are {', '.join(SAMPLING_FIELDS)}"
        )
    found = {name: _number(value) for name, value in given.items() if value is not None}
    if isinstance(bias := found.get("logit_bias"), dict):
        found["logit_bias"] = {
            int(token) if token.isdigit() else token: value for token, value in bias.items()
        }
    return found


def _number(value: Any) -> Any:
    """A number that was sent as a string; anything else is unchanged."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
