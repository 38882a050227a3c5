"""Limits the thinking of one sequence: after a number of tokens the closing tag must follow."""

import copy
from collections.abc import Callable, Sequence

from glm4_runtime.reasoning import CLOSE

_TAG = CLOSE.encode()


class ThinkingBudget:
    """Counts the tokens of a thought that the prompt opened.

    Attributes:
        forced: the token that must come next. None: any may come.
    """

    def __init__(self, most: int, closing: Sequence[int], token_bytes: Callable[[int], bytes]) -> None:
        """
        Args:
            most: tokens of thinking before the closing tag.
            closing: the tokens of the closing tag.
            token_bytes: gives the bytes of a token.
        """
        self.forced: int | None = None
        self._left, self._closing, self._token_bytes = most, tuple(closing), token_bytes
        self._written = 0  # tokens of the closing tag
        self._tail: bytes | None = b""  # the last bytes of the thinking; None after its end

    def advance(self, token: int) -> None:
        if self._tail is None:
            return
        text = self._tail + self._token_bytes(token)
        if _TAG in text:
            self.forced = self._tail = None
            return
        self._tail = text[1 - len(_TAG) :]
        self._left -= 1
        if self._left <= 0:
            self.forced = self._closing[self._written]
            self._written += 1

    def copy(self) -> "ThinkingBudget":
        return copy.copy(self)
