"""The chance that a drafted token is right, measured for all requests and for each one."""

from dataclasses import dataclass


@dataclass
class _Tally:
    """Recent right and wrong tokens; older ones count less.

    Attributes:
        keeps: factor of what was counted before, at each new token.
    """

    keeps: float
    right: float = 0.0
    seen: float = 0.0

    def add(self, right: bool) -> None:
        self.right = self.right * self.keeps + right
        self.seen = self.seen * self.keeps + 1

    def chance(self, prior: float, weight: float) -> float:
        """With ``prior`` as the result of ``weight`` tokens more."""
        return (self.right + prior * weight) / (self.seen + weight)


class Chances:
    """Of one kind of draft. A new request begins with the chance of the others."""

    _EVERYBODY, _ONE = (
        0.98,
        0.93,
    )  # what is kept: about the last 50 tokens of all, and the last 14 of one request
    _WEIGHT = 3.0

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._all = _Tally(self._EVERYBODY)
        self._of: dict[object, _Tally] = {}

    def of(self, request: object) -> float:
        everybody = self._all.chance(self._prior, self._WEIGHT)
        own = self._of.get(request)
        return everybody if own is None else own.chance(everybody, self._WEIGHT)

    def learn(self, request: object, right: int, wrong: bool) -> None:
        """``right`` tokens of a draft were right, and then one was wrong or the draft had ended."""
        own = self._of.setdefault(request, _Tally(self._ONE))
        for hit in (True,) * right + (False,) * wrong:
            own.add(hit)
            self._all.add(hit)

    def forget(self, request: object) -> None:
        self._of.pop(request, None)


def expected_tokens(chance: float, drafted: int) -> float:
    """Expected tokens of a verified draft: the right ones before the first wrong one, and one more."""
    if chance >= 1:
        return drafted + 1.0
    return float((1 - chance ** (drafted + 1)) / (1 - chance))
