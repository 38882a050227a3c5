"""Stop strings in a text that comes in pieces."""

from collections.abc import Iterable


class StopStrings:
    """Passes text on up to the first stop string, holding back what could still become one.

    Of several stop strings the one that is completed first counts, whatever pieces the text comes in; of
    those completed by the same character, the longest. Each character is looked at once for each stop string
    (the Knuth-Morris-Pratt algorithm).
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [_Stop(stop) for stop in dict.fromkeys(stops)]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string ended it."""
        if not self._held and not any(stop.first in text for stop in self._stops):
            return text, False
        ends = [found for stop in self._stops if (found := stop.find(text))]
        text, before = self._held + text, len(self._held)
        if ends:
            self._held = ""
            for stop in self._stops:
                stop.matched = 0
            end, minus_length = min(ends)
            return text[: before + end + minus_length], True
        held = max(stop.matched for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back, now that no stop string can follow."""
        held, self._held = self._held, ""
        return held


class _Stop:
    """One stop string; ``matched`` is how much of it the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self._stop, self.first = stop, stop[0]
        self.matched = 0
        # For each beginning that was matched yet, the length of its longest proper end that is a beginning, too.
        self._borders = [0]

    def find(self, text: str) -> tuple[int, int] | None:
        """Where in ``text`` the string is completed first, and its length below zero."""
        at = 0
        while at < len(text):
            if not self.matched:  # up to the next place where it could begin
                at = text.find(self.first, at)
                if at < 0:
                    return None
            self.matched = self._extended(self.matched, text[at])
            at += 1
            if self.matched > len(self._borders):
                self._borders.append(self._extended(self._borders[-1], self._stop[self.matched - 1]))
            if self.matched == len(self._stop):
                return at, -self.matched
        return None

    def _extended(self, length: int, character: str) -> int:
        """The longest beginning that a text ends with, if ``length`` was matched before ``character``."""
        while length and self._stop[length] != character:
            length = self._borders[length - 1]
        return length + (self._stop[length] == character)
