"""Scans the arguments of a tool call while they are generated: finds their end, and turns Python literals into JSON.

A model may write Python: ``{'city': 'Oslo', 'exact': True}``. In JSON, single quotes and the words True, False and
None occur only inside strings, so valid JSON passes unchanged. Escapes that JSON does not have are replaced by JSON's
own, or by a backslash.
"""

import re
from collections.abc import Callable

# Runs of characters that pass unchanged: outside strings, and inside strings by their quote.
_PLAIN = re.compile(r"[^\"'{}A-Za-z_]+")
_IN_STRING = {'"': re.compile(r'[^"\\]+'), "'": re.compile(r"[^'\"\\\x00-\x1f]+")}
_WORDS = {"True": "true", "False": "false", "None": "null"}
_LONGEST_WORD = max(map(len, _WORDS))
# Python's escapes as JSON writes them, by the character after the backslash. Any other is a literal backslash.
_ESCAPES = {
    "'": "'",
    "\n": "",
    "x": "\\u00",
    "0": "\\u0000",
    "a": "\\u0007",
    "v": "\\u000b",
    **{character: "\\" + character for character in '"\\/bfnrtu'},
}


class ArgumentScanner:
    """Takes text up to the brace that closes the first one, or the ``depth`` braces that are open already."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._word = ""
        self._quote = ""
        self._state: Callable[[str, int], tuple[str, int]] = self._outside
        self.done = False

    def push(self, text: str, start: int) -> tuple[str, int]:
        """The JSON that ``text[start:]`` adds, and the position in ``text`` where the scan ended."""
        pieces = []
        at = start
        while at < len(text) and not self.done:
            piece, at = self._state(text, at)
            pieces.append(piece)
        return "".join(pieces), at

    def flush(self) -> str:
        """The text that was held back: the beginning of a word."""
        word, self._word = self._word, ""
        return word

    def _outside(self, text: str, at: int) -> tuple[str, int]:
        character = text[at]
        if character.isascii() and (character.isalpha() or character == "_"):
            self._state = self._in_word
            return "", at
        if found := _PLAIN.match(text, at):
            return found[0], found.end()
        if character in "\"'":
            self._quote, self._state = character, self._in_string
            return '"', at + 1
        self._depth += 1 if character == "{" else -1
        self.done = self._depth == 0
        return character, at + 1

    def _in_word(self, text: str, at: int) -> tuple[str, int]:
        """Hold a word until it ends, or is longer than Python's constants."""
        character = text[at]
        if character.isascii() and (character.isalnum() or character == "_"):
            if len(self._word) <= _LONGEST_WORD:
                self._word += character
                return "", at + 1
            return self.flush() + character, at + 1
        word = self.flush()
        self._state = self._outside
        return _WORDS.get(word, word), at

    def _in_string(self, text: str, at: int) -> tuple[str, int]:
        if found := _IN_STRING[self._quote].match(text, at):
            return found[0], found.end()
        character = text[at]
        if character == "\\":
            self._state = self._escaped
            return "", at + 1
        if character == self._quote:
            self._state = self._outside
            return '"', at + 1
        # only in single quotes: characters that a JSON string must escape
        return '\\"' if character == '"' else f"\\u{ord(character):04x}", at + 1

    def _escaped(self, text: str, at: int) -> tuple[str, int]:
        self._state = self._in_string
        return _ESCAPES.get(text[at], "\\\\" + text[at]), at + 1
