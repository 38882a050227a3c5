"""Prompts in which no text of a message becomes a control token.

A mark is inserted into names of control tokens in messages, such as ``<|user|>``, before the template renders. The
tokenizer then encodes a marked name as plain text, without the mark.
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
        marked: the text from the template.
        mark: the mark inside names that are plain text; empty if there are none.
    """

    marked: str
    mark: str = ""

    @property
    def text(self) -> str:
        """The prompt without marks."""
        return self.marked.replace(self.mark, "") if self.mark else self.marked


def marked(value: Any, names: Collection[str]) -> tuple[Any, str]:
    """JSON data with a mark inserted into all ``names`` in its texts, and the mark; "" if no name occurs."""
    if not names:
        return value, ""
    choices = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    if not any(re.search(choices, text) for text in _texts(value)):
        return value, ""
    mark = _absent_from(json.dumps(value, ensure_ascii=False))
    first_letter = re.compile(f"(?=(?:{choices}))(.)", re.DOTALL)
    return _replaced(value, first_letter, mark), mark


def _absent_from(text: str) -> str:
    """Digits that do not occur in ``text``. Templates do not change digits, and JSON does not escape them."""
    number = _FIRST_MARK
    while str(number) in text:
        number += 1
    return str(number)


def _texts(value: Any) -> list[str]:
    """Every string in JSON data, keys included."""
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
