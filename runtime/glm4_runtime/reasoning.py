"""A Z1 model's thought and its answer, told apart while the text is still coming.

The thought stands between ``<think>`` and ``</think>``, which are ordinary text. Z1's template ends the prompt
with the opening tag, so a reply then starts inside the thought; other replies may write the tag themselves.
"""

from collections.abc import Callable

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
    between ``<|assistant|>`` and its answer is dropped, and the rest passes through as it is.
    """

    def __init__(self, inside: bool = False) -> None:
        self._inside = inside
        self._held = ""
        self._step: Callable[[], tuple[str, str]] = self._start

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside a thought."""
        return self._step in (self._thought_begins, self._thought) or (
            self._step == self._start and self._inside
        )

    def push(self, text: str) -> tuple[str, str]:
        """The thought and the answer that are certain now."""
        self._held += text
        thought = answer = ""
        step = None
        while step != self._step:  # until the state rests
            step = self._step
            more_thought, more_answer = step()
            thought, answer = thought + more_thought, answer + more_answer
        return thought, answer

    def flush(self) -> tuple[str, str]:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        if self._step == self._start:
            return (held.strip(), "") if self._inside else ("", held.removeprefix("\n"))
        return (held.rstrip(), "") if self.thinking else ("", held)

    # The states: each takes what it can from what is held -----------------------------------------

    def _start(self) -> tuple[str, str]:
        body = self._held.lstrip()
        if body.startswith(OPEN):
            self._held = body.removeprefix(OPEN)
            self._step = self._thought_begins
        elif not OPEN.startswith(body):
            if self._inside:
                self._step = self._thought_begins
            else:
                self._held = self._held.removeprefix("\n")
                self._step = self._answer
        return "", ""

    def _thought_begins(self) -> tuple[str, str]:
        self._held = self._held.lstrip()
        if self._held:
            self._step = self._thought
        return "", ""

    def _thought(self) -> tuple[str, str]:
        before, closed, after = self._held.partition(CLOSE)
        if closed:
            self._held, self._step = after, self._answer_begins
            return before.rstrip(), ""
        kept = _could_begin(self._held, CLOSE)
        certain = self._held[: len(self._held) - kept].rstrip()
        self._held = self._held[len(certain) :]
        return certain, ""

    def _answer_begins(self) -> tuple[str, str]:
        self._held = self._held.lstrip()
        if self._held:
            self._step = self._answer
        return "", ""

    def _answer(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        return "", held


def _could_begin(text: str, tag: str) -> int:
    """The length of the longest end of ``text`` that ``tag`` begins with."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
