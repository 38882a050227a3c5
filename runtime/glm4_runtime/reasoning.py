"""A Z1 model's thought and its answer, told apart while the text is still coming.

The thought stands between ``<think>`` and ``</think>``, which are ordinary text. Z1's template ends the prompt
with the opening tag, so a reply then starts inside the thought; other replies may write the tag themselves.
"""

from collections.abc import Callable

from glm4_runtime.text_pieces import TextPieces

OPEN = "<think>"
CLOSE = "</think>"


def begins_inside(prompt: str) -> bool:
    """Whether a reply to this rendered prompt starts inside a thought."""
    return prompt.rstrip().endswith(OPEN)


def without_thoughts(content: str) -> str:
    """What of an assistant's earlier message goes back into the history: the text after the last thought."""
    _, closed, answer = content.rpartition(CLOSE)
    if closed:
        return answer.lstrip()
    return "" if content.lstrip().startswith(OPEN) else content


class ThoughtSplitter:
    """Splits a stream into thought and answer; the result does not depend on how the text is cut.

    White space around the thought is no part of either. Without a thought, the one newline that GLM-4 writes
    between ``<|assistant|>`` and its answer is dropped, and the rest passes through as it is. A thought that never
    closes stays a thought, and there is no answer. The work is linear in the text.
    """

    def __init__(self, inside: bool = False) -> None:
        self._inside = inside
        self._blank = TextPieces()  # white space that counts only if more follows
        self._tag = ""  # what could become a tag
        self._state: Callable[[str], tuple[str, str, str]] = self._start

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside a thought."""
        return self._state in (self._thought_begins, self._thought) or (
            self._state == self._start and self._inside
        )

    def push(self, text: str) -> tuple[str, str]:
        """The thought and the answer that are certain now."""
        thoughts, answers = [], []
        while text:
            thought, answer, text = self._state(text)
            thoughts.append(thought)
            answers.append(answer)
        return "".join(thoughts), "".join(answers)

    def flush(self) -> tuple[str, str]:
        """What was held back, now that nothing follows."""
        blank, tag = self._blank.take(), self._tag
        self._tag = ""
        if self._state == self._start:
            return (tag, "") if self._inside else ("", (blank + tag).removeprefix("\n"))
        return (blank + tag if tag else "", "") if self.thinking else ("", "")

    # The states: each takes text, and gives thought, answer, and the text that the next state takes ---------

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
        """``text`` behind its white space, which is held."""
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
    """The length of the longest end of ``text`` that ``tag`` begins with."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
