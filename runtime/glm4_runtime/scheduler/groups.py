"""How many groups of requests decode in turn, where the stages of a model overlap: one group works in each stage.

A decision from measurements: no session, thread or clock. Two halves of a batch read the weights twice, so a second group
pays only if a step of half the batch is much faster.
"""

from collections.abc import Sequence

# A further group must save this share of the time, because it delays each token.
WORTH = 0.03
# Measured steps of a number of groups before it is judged; the first ones still contain the change.
_STEPS, _FIRST = 6, 2
# Steps after which the other numbers of groups are measured again.
_AGAIN = 2000
_LEARN = 0.2


class Grouping:
    """Chooses the number of groups for a number of requests, which are counted in powers of two."""

    def __init__(self, most: int) -> None:
        """``most``: groups, at most one for each stage."""
        self._most = most
        self._tables: dict[int, _Table] = {}

    def groups(self, requests: int) -> int:
        """The number of groups for the next step."""
        most = min(self._most, requests)
        return self._table(requests).choose(range(1, most + 1)) if most > 1 else 1

    def measured(self, requests: int, groups: int, seconds: float) -> None:
        """Record the seconds per token of a step in which nothing but decoding ran."""
        self._table(requests).learn(groups, seconds)

    def _table(self, requests: int) -> "_Table":
        return self._tables.setdefault(requests.bit_length(), _Table())


class _Table:
    """Measurements for about the same number of requests."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._age = 0

    def choose(self, candidates: Sequence[int]) -> int:
        for groups in candidates:
            if self._counts.get(groups, 0) < _FIRST + _STEPS:
                return groups
        return min(candidates, key=lambda groups: self._seconds[groups] * (1 + WORTH * (groups - 1)))

    def learn(self, groups: int, seconds: float) -> None:
        count = self._counts[groups] = self._counts.get(groups, 0) + 1
        if count > _FIRST:
            known = self._seconds.get(groups, seconds)
            self._seconds[groups] = known + (seconds - known) * _LEARN
        self._age += 1
        if self._age % _AGAIN == 0:
            self._counts = {}
