"""Refuses formats that are known to crash llguidance, before a worker tries them, with a clear message."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glm4_runtime.errors import RequestError

if TYPE_CHECKING:
    from glm4_runtime.structured import ReplyFormat

# llguidance reads JSON of 128 levels, five of which are ours.
_MOST_LEVELS = 120
# Smaller 64-bit integers become -2^63 in llguidance, whose negation never ends.
_ENDLESS = range(-(2**63), 1024 - 2**63)
# The patterns of one allOf are intersected; each one doubles the cost.
_MOST_PATTERNS = 12
_MOST_RULES = 2000
_MOST_CHARACTERS = 2**20

_RULE = re.compile(
    r"^[ \t]*[?!]?[A-Za-z_]\w*(?:\[[^\]\n]*\])*(?:\{[^}\n]*\})?(?:\.-?\d+)?[ \t]*:", re.MULTILINE
)


def require_plain(reply: "ReplyFormat") -> None:
    """Raises :class:`RequestError` for a format that is known to fail."""
    if reply.answer is not None:
        if isinstance(reply.answer.definition, Mapping):
            _require_schema(reply.answer.definition, "the schema")
        else:
            _require_text(reply.answer.definition, reply.answer.kind)
    for function in reply.functions:
        _require_schema(function.parameters, f"the schema of the function {function.name[:64]!r}")


def _refused(why: str) -> RequestError:
    return RequestError(f"this format cannot be enforced: {why}")


def _require_text(text: str, kind: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refused(f"the format is not valid Unicode: half a surrogate pair at {error.start}") from error
    if len(text) > _MOST_CHARACTERS:
        raise _refused(f"the {kind} has {len(text)} characters; at most {_MOST_CHARACTERS} are taken")
    rules = len(_RULE.findall(text)) if kind == "grammar" else 0
    if rules > _MOST_RULES:
        raise _refused(f"the grammar has {rules} rules; at most {_MOST_RULES} are taken")


def _require_schema(schema: Mapping[str, Any], what: str) -> None:
    level: list[Any] = [schema]
    depth = 0
    while level:
        if depth > _MOST_LEVELS:
            raise _refused(f"{what} is nested deeper than {_MOST_LEVELS} levels; use $defs and $ref instead")
        below: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                _require_few_patterns(value, what)
                below.extend(value.values())
            elif isinstance(value, Sequence) and not isinstance(value, str):
                below.extend(value)
            elif isinstance(value, int) and value in _ENDLESS:
                raise _refused(f"{what} holds the number {value}; the smallest integer is {_ENDLESS.stop}")
        level, depth = below, depth + 1


def _require_few_patterns(schema: Mapping[str, Any], what: str) -> None:
    parts = schema.get("allOf")
    if not isinstance(parts, Sequence):
        return
    patterns = sum(isinstance(part, Mapping) and "pattern" in part for part in parts)
    if patterns > _MOST_PATTERNS:
        raise _refused(
            f"{what} has an allOf of {patterns} patterns; at most {_MOST_PATTERNS} can be enforced together"
        )
