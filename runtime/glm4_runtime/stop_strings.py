"""Finds stop strings in a text that arrives in pieces."""

from collections.abc import Iterable


class StopStrings:
    """Passes text on up to the first stop string. Holds back text that may become one.

    The stop string that is completed first counts, independent of the pieces. If one character completes several, the
    longest counts. Each character is read once per stop string (Knuth-Morris-Pratt algorithm).

    Attributes:
        found: the stop string that ended the text; None if none did.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [_Stop(stop) for stop in dict.fromkeys(stops)]
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string ended it."""
        if not self._held and not any(stop.first in text for stop in self._stops):
            return text, False
        ends = [(*found, stop.text) for stop in self._stops if (found := stop.find(text))]
        text, before = self._held + text, len(self._held)
        if ends:
            self._held = ""
            for stop in self._stops:
                stop.matched = 0
            end, minus_length, self.found = min(ends)
            return text[: before + end + minus_length], True
        held = max(stop.matched for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """The text that was held back, at the end."""
        held, self._held = self._held, ""
        return held


class _Stop:
    """One stop string; ``matched``: length of its prefix that the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.text, self.first = stop, stop[0]
        self.matched = 0
        # For each matched prefix: length of its longest proper suffix that is also a prefix.
        self._borders = [0]

    def find(self, text: str) -> tuple[int, int] | None:
        """Position in ``text`` where the string is first completed, and its negative length."""
        at = 0
        while at < len(text):
            if not self.matched:  # skip to the next position where it can begin
                at = text.find(self.first, at)
                if at < 0:
                    return None
            self.matched = self._extended(self.matched, text[at])
            at += 1
            if self.matched > len(self._borders):
                self._borders.append(self._extended(self._borders[-1], self.text[self.matched - 1]))
            if self.matched == len(self.text):
                return at, -self.matched
        return None

    def _extended(self, length: int, character: str) -> int:
        """Length of the longest matched prefix after ``character``, if ``length`` was matched before."""
        while length and self.text[length] != character:
            length = self._borders[length - 1]
        return length + (self.text[length] == character)
