"""Rules that judge a generated answer."""

import json
import re
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
FINAL = re.compile(r"answer is\D{0,20}?(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)
FENCE = re.compile(r"^\s*```\w*\n(.*?)\n?```", re.DOTALL)


def same_number(text: str, expected: str) -> bool:
    """Whether the number behind the last "answer is", or else the last number, is the last number of ``expected``."""
    wanted = _number(expected)
    return wanted is not None and _number(text) == wanted


def _number(text: str) -> float | None:
    found = FINAL.findall(text) or NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def same_record(text: str, expected: str) -> bool:
    """Whether the first JSON object of the text equals ``expected``, in any order of its keys."""
    return bool(_first_object(text) == json.loads(expected))


def is_call(text: str, expected: str, schemas: dict[str, Any]) -> bool:
    """Whether the text calls the function of ``expected``, with arguments that its schema allows and that are equal.

    Args:
        text: a name, a line end and JSON; or JSON with "name" and "arguments".
        schemas: function's name to the JSON schema of its arguments, an object of strings and integers.
    """
    name, arguments = _call(text)
    wanted, wanted_arguments = _call(expected)
    return name == wanted and _fits(arguments, schemas.get(name)) and arguments == wanted_arguments


def _call(text: str) -> tuple[str, Any]:
    found = _first_object(text)
    if isinstance(found, dict) and found.keys() >= {"name", "arguments"}:
        return str(found["name"]), found["arguments"]
    return text.strip().partition("\n")[0].strip(), found


def _fits(arguments: Any, schema: Any) -> bool:
    if not isinstance(arguments, dict) or schema is None or arguments.keys() != set(schema["required"]):
        return False
    return all(_is_of(value, schema["properties"][name]) for name, value in arguments.items())


def _is_of(value: Any, schema: dict[str, Any]) -> bool:
    if schema["type"] == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str) and value in schema.get("enum", [value])


def _first_object(text: str) -> Any:
    fenced = FENCE.match(text)
    text = fenced.group(1) if fenced else text
    start = text.find("{")
    if start < 0:
        return None
    try:
        return json.JSONDecoder().raw_decode(text[start:])[0]
    except (json.JSONDecodeError, RecursionError):
        return None
