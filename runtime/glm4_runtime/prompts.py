"""The prompt of a conversation, in which nobody's text becomes a control token.

Names of control tokens within messages, such as ``<|user|>``, are broken by a mark before a template sees them. Where
the tokenizer meets the mark, it encodes the name as plain text and leaves the mark out.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FIRST_MARK = 70_360_941_528


@dataclass(frozen=True)
class Prompt:
    """
    Attributes:
        marked: the text as the template wrote it.
        mark: stands within names of control tokens that are plain text; empty where there are none.
    """

    marked: str
    mark: str = ""

    @property
    def text(self) -> str:
        """The prompt as a reader sees it."""
        return self.marked.replace(self.mark, "") if self.mark else self.marked


def marked(value: Any, names: Collection[str]) -> tuple[Any, str]:
    """JSON data with every one of ``names`` in its texts broken by a mark, and that mark; "" where there is nothing to break."""
    if not names:
        return value, ""
    choices = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    if not any(re.search(choices, text) for text in _texts(value)):
        return value, ""
    mark = _absent_from(json.dumps(value, ensure_ascii=False))
    first_letter = re.compile(f"(?=(?:{choices}))(.)", re.DOTALL)
    return _replaced(value, first_letter, mark), mark


def _absent_from(text: str) -> str:
    """Digits that do not occur in ``text``: no template changes digits, nor does JSON escape them."""
    number = _FIRST_MARK
    while str(number) in text:
        number += 1
    return str(number)


def _texts(value: Any) -> list[str]:
    """Every text within JSON data, names of members too."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Mapping):
            waiting.extend(value)
            waiting.extend(value.values())
        elif isinstance(value, Sequence):
            waiting.extend(value)
    return found


def _replaced(value: Any, first_letter: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        return first_letter.sub(rf"\g<1>{mark}", value)
    if isinstance(value, Mapping):
        return {
            _replaced(name, first_letter, mark): _replaced(member, first_letter, mark)
            for name, member in value.items()
        }
    if isinstance(value, Sequence):
        return [_replaced(member, first_letter, mark) for member in value]
    return value
