"""Drafts: guesses of the next tokens from the text so far, and a decision whether they pay.

Prompt lookup: after the same few tokens, a text often continues in the same way (Saxena, "Prompt Lookup Decoding",
2023). The guess costs nothing; one run verifies it.
"""

from dataclasses import dataclass

import numpy as np

from glm4_runtime.arrays import Ids

SHORTEST_MATCH = 2
LONG_MATCH = 6  # maximum match length; a match of this length is much more likely to continue
WIDTHS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow, because the ``matched`` tokens before them occurred earlier in the text."""

    ids: Ids
    matched: int


def look_up(ids: Ids, count: int) -> Draft | None:
    """Find the longest earlier match of the end of ``ids``, the latest if there are several; draft the ``count``
    tokens after it.

    If the match overlaps the end, the text repeats itself, and the draft continues the repetition.
    """
    ends = np.flatnonzero(ids[:-1] == ids[-1])
    matched = 1
    while matched < LONG_MATCH and len(ends):
        longer = ends[ends >= matched]
        longer = longer[ids[longer - matched] == ids[-1 - matched]]
        if not len(longer):
            break
        ends, matched = longer, matched + 1
    if not len(ends) or matched < SHORTEST_MATCH:
        return None
    start = int(ends[-1]) + 1
    return Draft(ids[start + np.arange(count) % (len(ids) - start)], matched)


class Speculation:
    """Decides how many tokens to draft, from measurements: a width pays if it gives more tokens per second.

    Every step teaches the chance that a drafted token is right, also steps without a draft: the possible draft and
    the real tokens are both known. The cost of a width, in plain steps, is learnt when the width is used. The cost is
    slowly forgotten, so that one slow run does not exclude a width for ever.
    """

    _LEARN = 0.2
    _FORGET = 0.01

    def __init__(self) -> None:
        self._plain_seconds = 0.0
        self._cost: dict[int, float] = dict.fromkeys(WIDTHS, 1.0)
        self._chance = {False: 0.5, True: 0.8}  # index: whether the match is long

    def width(self, matched: int, most: int) -> int:
        """Number of tokens to draft after a match of this length, at most ``most``; 0 if a draft does not pay."""
        chance = self._chance[matched >= LONG_MATCH]
        rates = {
            width: _expected(chance, min(width, most)) / self._cost[width] for width in WIDTHS if most > 0
        }
        best = max(rates, key=rates.__getitem__, default=0)
        return min(best, most) if self._plain_seconds and rates.get(best, 0.0) > 1 else 0

    def decoded(self, seconds: float) -> None:
        """Record the time of a plain step of a single sequence."""
        self._plain_seconds += (seconds - self._plain_seconds) * (self._LEARN if self._plain_seconds else 1)
        for width, cost in self._cost.items():
            self._cost[width] = cost + (1 - cost) * self._FORGET

    def verified(self, drafted: int, seconds: float) -> None:
        """Record the time of a step that verified ``drafted`` tokens."""
        width = next(width for width in WIDTHS if width >= drafted)
        self._cost[width] += (seconds / self._plain_seconds - self._cost[width]) * 2 * self._LEARN

    def compared(self, matched: int, right: int, wrong: int) -> None:
        """Record that after a match of this length ``right`` tokens were right, and then ``wrong`` (0 or 1) was
        wrong."""
        long = matched >= LONG_MATCH
        for hit in (1.0,) * right + (0.0,) * wrong:
            self._chance[long] += (hit - self._chance[long]) * self._LEARN


def _expected(chance: float, drafted: int) -> float:
    """Expected tokens of a verified draft: the right ones, and one more."""
    return sum(chance**i for i in range(drafted + 1))
