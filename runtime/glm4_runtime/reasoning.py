"""Separates a Z1 model's thinking from its answer while the text is generated.

The thinking is between ``<think>`` and ``</think>``, which are ordinary text. Z1's template ends the prompt with the
opening tag, so the reply starts inside the thinking. Other replies may contain the tag themselves.
"""

from collections.abc import Callable

from glm4_runtime.text_pieces import TextPieces

OPEN = "<think>"
CLOSE = "</think>"


def begins_inside(prompt: str) -> bool:
    """Whether a reply to this rendered prompt starts inside the thinking."""
    return prompt.rstrip().endswith(OPEN)


def without_thoughts(content: str) -> str:
    """The part of an assistant's earlier message that stays in the history: the text after the last ``</think>``."""
    _, closed, answer = content.rpartition(CLOSE)
    if closed:
        return answer.lstrip()
    return "" if content.lstrip().startswith(OPEN) else content


class ThoughtSplitter:
    """Splits a stream into thinking and answer. The result does not depend on the pieces of the stream.

    White space around the thinking belongs to neither. Without thinking, the newline that GLM-4 writes after
    ``<|assistant|>`` is dropped, and the rest passes unchanged. If the thinking never closes, there is no answer. The
    cost is linear in the text.
    """

    def __init__(self, inside: bool = False) -> None:
        self._inside = inside
        self._blank = TextPieces()  # white space that is kept only if more text follows
        self._tag = ""  # text that may become a tag
        self._state: Callable[[str], tuple[str, str, str]] = self._start

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside the thinking."""
        return self._state in (self._thought_begins, self._thought) or (
            self._state == self._start and self._inside
        )

    def push(self, text: str) -> tuple[str, str]:
        """The new parts of thinking and answer that are certain."""
        thoughts, answers = [], []
        while text:
            thought, answer, text = self._state(text)
            thoughts.append(thought)
            answers.append(answer)
        return "".join(thoughts), "".join(answers)

    def flush(self) -> tuple[str, str]:
        """The text that was held back, at the end of the stream."""
        blank, tag = self._blank.take(), self._tag
        self._tag = ""
        if self._state == self._start:
            return (tag, "") if self._inside else ("", (blank + tag).removeprefix("\n"))
        return (blank + tag if tag else "", "") if self.thinking else ("", "")

    # The states: each takes text, and returns thinking, answer, and the text for the next state ---------

    def _start(self, text: str) -> tuple[str, str, str]:
        body = self._tag + (text if self._tag else self._without_blank(text))
        self._tag = ""
        if body.startswith(OPEN):
            self._blank.take()
            self._state = self._thought_begins
            return "", "", body.removeprefix(OPEN)
        if OPEN.startswith(body):
            self._tag = body
            return "", "", ""
        if self._inside:
            self._blank.take()
            self._state = self._thought_begins
            return "", "", body
        self._state = self._answer
        return "", (self._blank.take() + body).removeprefix("\n"), ""

    def _without_blank(self, text: str) -> str:
        """``text`` without its leading white space, which is held back."""
        body = text.lstrip()
        self._blank.add(text[: len(text) - len(body)])
        return body

    def _thought_begins(self, text: str) -> tuple[str, str, str]:
        body = text.lstrip()
        if body:
            self._state = self._thought
        return "", "", body

    def _thought(self, text: str) -> tuple[str, str, str]:
        before, closed, after = (self._tag + text).partition(CLOSE)
        kept = 0 if closed else _could_begin(before, CLOSE)
        self._tag = before[len(before) - kept :]
        body = before[: len(before) - kept]
        shown = body.rstrip()
        thought = self._blank.take() + shown if shown else ""
        self._blank.add(body[len(shown) :])
        if closed:
            self._blank.take()
            self._state = self._answer_begins
        return thought, "", after

    def _answer_begins(self, text: str) -> tuple[str, str, str]:
        body = text.lstrip()
        if body:
            self._state = self._answer
        return "", "", body

    def _answer(self, text: str) -> tuple[str, str, str]:
        return "", text, ""


def _could_begin(text: str, tag: str) -> int:
    """Length of the longest suffix of ``text`` that is a prefix of ``tag``."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
