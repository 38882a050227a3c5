"""Guessing the next tokens from those there are, and whether it pays.

Prompt lookup: the text often goes on as it did the last time that its last few tokens stood there
(Saxena, "Prompt Lookup Decoding", 2023). The guess costs nothing; one run verifies all of it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

SHORTEST_MATCH = 2
LONG_MATCH = 6  # matches are compared so far back; one of this length is much likelier to go on
WIDTHS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow, because the ``matched`` tokens before them stood in the text already."""

    ids: Ids
    matched: int


def look_up(ids: Ids, count: int) -> Draft | None:
    """The ``count`` tokens after the latest of the longest earlier matches of the end of ``ids``.

    Where the match overlaps the end, the text repeats itself, and the draft goes on repeating it.
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
    """How many tokens to draft, by what was measured: a width pays if it gives more tokens per second.

    The chance that a drafted token is right is learnt from every step, also from those that verify nothing:
    what would have been drafted is known, and so is what came. The cost of a width, in plain steps, is
    learnt when it is used and slowly forgotten, so that one slow run does not rule it out for good.
    """

    _LEARN = 0.2
    _FORGET = 0.01

    def __init__(self) -> None:
        self._plain_seconds = 0.0
        self._cost: dict[int, float] = dict.fromkeys(WIDTHS, 1.0)
        self._chance = {False: 0.5, True: 0.8}  # by whether the match is a long one

    def width(self, matched: int, most: int) -> int:
        """Tokens to draft after a match of this length, at most ``most``; 0 where it does not pay."""
        chance = self._chance[matched >= LONG_MATCH]
        rates = {
            width: _expected(chance, min(width, most)) / self._cost[width] for width in WIDTHS if most > 0
        }
        best = max(rates, key=rates.__getitem__, default=0)
        return min(best, most) if self._plain_seconds and rates.get(best, 0.0) > 1 else 0

    def decoded(self, seconds: float) -> None:
        """A plain step of a single sequence took so long."""
        self._plain_seconds += (seconds - self._plain_seconds) * (self._LEARN if self._plain_seconds else 1)
        for width, cost in self._cost.items():
            self._cost[width] = cost + (1 - cost) * self._FORGET

    def verified(self, drafted: int, seconds: float) -> None:
        """A step that verified so many tokens took so long."""
        width = next(width for width in WIDTHS if width >= drafted)
        self._cost[width] += (seconds / self._plain_seconds - self._cost[width]) * 2 * self._LEARN

    def compared(self, matched: int, right: int, wrong: int) -> None:
        """Of the tokens after a match of this length so many were right before ``wrong`` (0 or 1) of them."""
        long = matched >= LONG_MATCH
        for hit in (1.0,) * right + (0.0,) * wrong:
            self._chance[long] += (hit - self._chance[long]) * self._LEARN


def _expected(chance: float, drafted: int) -> float:
    """Tokens that a verified draft gives: the right ones, and the one after them."""
    return sum(chance**i for i in range(drafted + 1))
