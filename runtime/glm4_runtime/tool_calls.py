"""Finds tool calls in a model's text, in the two forms of the family. Several may follow each other.

    get_weather
    {"city": "Oslo"}

    {"name": "get_weather", "arguments": {"city": "Oslo"}}

GLM-4-0414 writes the first form, GLM-Z1-Rumination the second. Only the function's name marks a call. So only names
of offered functions count, and only at the beginning of a line, or of a turn after a call or ``<|assistant|>``. Lines
in a fenced code block are never calls.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Collection
from dataclasses import dataclass

from glm4_runtime.call_arguments import ArgumentScanner
from glm4_runtime.text_pieces import TextPieces

_BLANK = " \t\r\n"
_BLANKS = re.compile(r"[ \t\r\n]+")
_SPACES = re.compile(r"[ \t\r]+")  # within a line
_FENCE = "```"
# The text before the arguments of the second form; white space may be between the parts.
_HEAD = ("{", '"name"', ":", None, ",", '"arguments"', ":")


@dataclass(frozen=True)
class Content:
    """Text that is not part of a call."""

    text: str


@dataclass(frozen=True)
class CallStart:
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the current call's arguments, converted to JSON if the model wrote Python."""

    text: str


@dataclass(frozen=True)
class CallEnd:
    """The closing brace of the arguments was reached. A call without this event was cut off."""


CallEvent = Content | CallStart | CallArguments | CallEnd


class CallParser:
    """Finds calls in a stream of text. The events together do not depend on the pieces of the stream.

    names       functions that were offered
    anywhere    look for calls also after other content; otherwise only at the beginning of the reply

    White space between content and a call, or between two calls, belongs to neither. The cost is linear in the text.
    """

    def __init__(self, names: Collection[str], anywhere: bool = True) -> None:
        self._names = _Names(names)
        self._anywhere = anywhere
        self._state: _State = self._line
        self._blank = TextPieces()  # white space that becomes content only if more content follows
        self._held = TextPieces()  # text that may become a call's head
        self._rest = TextPieces()  # white space after it, on a line of its own if _fresh
        self._fresh = self._fenced = self._gapped = False
        self._word = ""  # a line's only word so far, or a part of the head of the second form
        self._part = 0  # number of complete parts of that head
        self._name = ""
        self._scanner = ArgumentScanner()
        self._enveloped = False
        self._events: list[tuple[_Kind, list[str]]] = []  # the event's class, and the pieces of its text

    def push(self, text: str) -> list[CallEvent]:
        """The events that are certain."""
        at = 0
        while at < len(text):
            at = self._state(text, at)
        return self._taken()

    def boundary(self) -> list[CallEvent]:
        """The model began another turn of its own, so a call may follow."""
        if self._anywhere and self._state in (
            self._line,
            self._head,
            self._envelope,
            self._value,
            self._text,
        ):
            self._give_up(self._line)
        return self._taken()

    def flush(self) -> list[CallEvent]:
        """The events of the text that was held back, at the end of the stream."""
        self._add(CallArguments, self._scanner.flush())
        if self._state not in (self._between, self._tail, self._skipped):
            self._give_up(self._text)
            self._add(Content, self._blank.take())
        self._blank.take()
        return self._taken()

    # The states: each reads the text from ``at`` on, and returns where the next state continues ---------

    def _line(self, text: str, at: int) -> int:
        """At the beginning of a line that may be a function's name."""
        if found := _SPACES.match(text, at):
            self._held.add(found[0])
            self._gapped = bool(self._word)
            if self._word and (self._fenced or self._word not in self._names):
                self._give_up(self._text)
            return found.end()
        character = text[at]
        self._held.add(character)
        if character == "\n":
            self._end_line()
        else:
            self._extend_word(character)
        return at + 1

    def _end_line(self) -> None:
        if self._word in self._names and not self._fenced:
            self._name, self._fresh, self._state = self._word, True, self._head
        else:
            self._give_up(self._line if self._anywhere or not self._word else self._text)

    def _extend_word(self, character: str) -> None:
        self._word += character
        if self._word == _FENCE and not self._gapped:
            self._fenced = not self._fenced
            self._give_up(self._text)
        elif self._word == "{" and not self._fenced and self._names:
            self._part, self._word, self._fresh, self._state = 1, "", False, self._envelope
        elif self._gapped or not (
            _FENCE.startswith(self._word) or (not self._fenced and self._names.begin_with(self._word))
        ):
            self._give_up(self._text)

    def _head(self, text: str, at: int) -> int:
        """After a function's name and the newline: an opening brace makes it a call."""
        return self._held_blanks(text, at) or self._opened(text, at, enveloped=False)

    def _envelope(self, text: str, at: int) -> int:
        """Inside the head of the second form, before its arguments."""
        if not self._word and (end := self._held_blanks(text, at)):
            return end
        word, part = self._word + text[at].replace("'", '"'), _HEAD[self._part]
        if not (self._begins_name(word) if part is None else part.startswith(word)):
            self._resume()
            return at
        self._held.add(self._rest.take() + text[at])
        self._fresh, self._word = False, word
        if word == part or (part is None and len(word) > 1 and word.endswith('"')):
            self._name = word[1:-1] if part is None else self._name
            self._part, self._word = self._part + 1, ""
            self._state = self._envelope if self._part < len(_HEAD) else self._value
        return at + 1

    def _begins_name(self, quoted: str) -> bool:
        name = quoted[1:]
        return quoted[0] == '"' and (
            self._names.begin_with(name) or (name.endswith('"') and name[:-1] in self._names)
        )

    def _value(self, text: str, at: int) -> int:
        """Before the arguments of the second form."""
        return self._held_blanks(text, at) or self._opened(text, at, enveloped=True)

    def _opened(self, text: str, at: int, enveloped: bool) -> int:
        if text[at] != "{":
            self._resume()
            return at
        for held in (self._held, self._rest, self._blank):
            held.take()
        self._word, self._gapped = "", False
        self._add(CallStart, self._name)
        self._scanner, self._enveloped, self._state = ArgumentScanner(), enveloped, self._arguments
        return at

    def _arguments(self, text: str, at: int) -> int:
        piece, end = self._scanner.push(text, at)
        self._add(CallArguments, piece)
        if self._scanner.done:
            self._events.append((_ended, []))
            self._state = self._tail if self._enveloped else self._between
        return end

    def _tail(self, text: str, at: int) -> int:
        """After the arguments of the second form: its closing brace, or unexpected members."""
        if found := _BLANKS.match(text, at):
            self._blank.add(found[0])
            return found.end()
        if text[at] not in "},":
            self._state = self._between
            return at
        self._blank.take()
        self._scanner, self._state = ArgumentScanner(depth=1), self._skipped
        return at

    def _skipped(self, text: str, at: int) -> int:
        _, end = self._scanner.push(text, at)
        if self._scanner.done:
            self._scanner, self._state = ArgumentScanner(), self._between
        return end

    def _between(self, text: str, at: int) -> int:
        """After a call: the next one, or content."""
        if found := _BLANKS.match(text, at):
            self._blank.add(found[0])
            return found.end()
        self._state = self._line
        return at

    def _text(self, text: str, at: int) -> int:
        """The rest of a line that is no call."""
        newline = text.find("\n", at) + 1
        end = newline or len(text)
        self._say(text[at:end])
        if newline and self._anywhere:
            self._state = self._line
        return end

    # How it is done -------------------------------------------------------------------------------

    def _held_blanks(self, text: str, at: int) -> int:
        """Hold the white space at ``at``; returns its end, or 0 if there is none."""
        found = _BLANKS.match(text, at)
        if found is None:
            return 0
        newline = found[0].rfind("\n") + 1
        if newline:
            self._held.add(self._rest.take() + found[0][:newline])
            self._fresh = True
        self._rest.add(found[0][newline:])
        return found.end()

    def _resume(self) -> None:
        """The held text is content. After its last newline a call may begin."""
        if self._fresh and self._anywhere:
            self._say(self._held.take())
            self._held.add(self._rest.take())
            self._word, self._gapped, self._state = "", False, self._line
        else:
            self._give_up(self._text)

    def _give_up(self, state: "_State") -> None:
        """The held text is content."""
        self._say(self._held.take())
        self._say(self._rest.take())
        self._word, self._gapped, self._state = "", False, state

    def _say(self, text: str) -> None:
        shown = text.rstrip(_BLANK)
        if shown:
            self._add(Content, self._blank.take() + shown)
        self._blank.add(text[len(shown) :])

    def _add(self, kind: "_Kind", text: str) -> None:
        """Add a piece; consecutive pieces of one kind become one event."""
        if not text:
            return
        if kind is not CallStart and self._events and self._events[-1][0] is kind:
            self._events[-1][1].append(text)
        else:
            self._events.append((kind, [text]))

    def _taken(self) -> list[CallEvent]:
        events, self._events = self._events, []
        return [kind("".join(pieces)) for kind, pieces in events]


_State = Callable[[str, int], int]
_Kind = Callable[[str], CallEvent]


def _ended(_text: str) -> CallEnd:
    return CallEnd()


class _Names:
    """The functions' names, and all their prefixes."""

    def __init__(self, names: Collection[str]) -> None:
        self._all = frozenset(names)
        self._sorted = sorted(self._all)

    def __bool__(self) -> bool:
        return bool(self._sorted)

    def __contains__(self, name: str) -> bool:
        return name in self._all

    def begin_with(self, text: str) -> bool:
        """Whether one of the names begins with ``text``."""
        at = bisect_left(self._sorted, text)
        return at < len(self._sorted) and self._sorted[at].startswith(text)
