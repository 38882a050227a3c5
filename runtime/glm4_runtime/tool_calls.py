"""GLM-4-0414's calls: a function's name, a newline, a JSON object; several may follow each other.

    get_weather
    {"city": "Oslo"}

Nothing but the name marks a call, so only the names of functions that were offered count, and only where a line
(or, after a call or ``<|assistant|>``, a turn) begins. Lines of a fenced code block are never calls.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

_BLANK = " \t\r\n"
_FENCE = "```"


@dataclass(frozen=True)
class Content:
    """Text that is not part of a call."""

    text: str


@dataclass(frozen=True)
class CallStart:
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the arguments of the call that started last, byte for byte as the model wrote it."""

    text: str


@dataclass(frozen=True)
class CallEnd:
    """The arguments' closing brace was reached. A call without it was cut off."""


CallEvent = Content | CallStart | CallArguments | CallEnd


class CallParser:
    """Finds calls in a stream of text; the events' sum does not depend on how the text is cut.

    names       functions that were offered
    anywhere    also look for calls after other content; else only where the reply begins

    White space between content and a call, or between two calls, belongs to neither.
    """

    def __init__(self, names: Collection[str], anywhere: bool = True) -> None:
        self._names = frozenset(names)
        self._anywhere = anywhere
        self._state: Callable[[str], None] = self._line
        self._held = ""  # could still become a call's head
        self._blank = ""  # white space that is content only if more content follows
        self._fenced = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._events: list[CallEvent] = []

    def push(self, text: str) -> list[CallEvent]:
        """What is certain now."""
        for character in text:
            self._state(character)
        return self._taken()

    def boundary(self) -> list[CallEvent]:
        """The model began another turn of its own: what comes next may be a call."""
        if self._anywhere and self._state in (self._line, self._head, self._text):
            self._give_up(self._line)
        return self._taken()

    def flush(self) -> list[CallEvent]:
        """What was held back, now that nothing follows."""
        if self._state != self._between:
            self._give_up(self._text)
            if self._blank:
                self._add(Content(self._blank))
        self._blank = ""
        return self._taken()

    # The states: each takes one character ---------------------------------------------------------

    def _line(self, character: str) -> None:
        """At the beginning of a line that may name a function."""
        self._held += character
        word = self._held.strip(_BLANK)
        if character == "\n":
            if word in self._names and not self._fenced:
                self._state = self._head
            else:
                self._give_up(self._line if self._anywhere or not word else self._text)
        elif word == _FENCE:
            self._fenced = not self._fenced
            self._give_up(self._text)
        elif not self._could_be_head():
            self._give_up(self._text)

    def _head(self, character: str) -> None:
        """After a function's name and the newline: an opening brace makes it a call."""
        if character == "{":
            name = self._held.strip(_BLANK)
            self._held = self._blank = ""
            self._add(CallStart(name))
            self._state, self._depth = self._arguments, 0
            self._in_string = self._escaped = False
            self._arguments(character)
        elif character in _BLANK:
            self._held += character
        else:
            line = self._held.rfind("\n") + 1
            rest, self._held = self._held[line:], self._held[:line]
            self._give_up(self._line if self._anywhere else self._text)
            for held in rest + character:
                self._state(held)

    def _arguments(self, character: str) -> None:
        self._add(CallArguments(character))
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character == "{":
            self._depth += 1
        elif character == "}":
            self._depth -= 1
            if self._depth == 0:
                self._add(CallEnd())
                self._state = self._between

    def _between(self, character: str) -> None:
        """After a call: the next one, or content."""
        if character in _BLANK:
            self._blank += character
        else:
            self._state = self._line
            self._line(character)

    def _text(self, character: str) -> None:
        """The rest of a line that is no call."""
        self._say(character)
        if character == "\n" and self._anywhere:
            self._state = self._line

    # How it is done -------------------------------------------------------------------------------

    def _could_be_head(self) -> bool:
        word = self._held.lstrip(_BLANK)
        if _FENCE.startswith(word):
            return True
        return not self._fenced and any(
            name.startswith(word) or word.rstrip(_BLANK) == name for name in self._names
        )

    def _give_up(self, state: Callable[[str], None]) -> None:
        """What was held is content after all."""
        held, self._held = self._held, ""
        self._say(held)
        self._state = state

    def _say(self, text: str) -> None:
        text = self._blank + text
        shown = text.rstrip(_BLANK)
        self._blank = text[len(shown) :]
        if shown:
            self._add(Content(shown))

    def _add(self, event: CallEvent) -> None:
        """Pieces of one kind that follow each other become one."""
        last = self._events[-1] if self._events else None
        if isinstance(event, Content) and isinstance(last, Content):
            self._events[-1] = Content(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            self._events[-1] = CallArguments(last.text + event.text)
        else:
            self._events.append(event)

    def _taken(self) -> list[CallEvent]:
        events, self._events = self._events, []
        return events
