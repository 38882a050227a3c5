"""The time of a step by the tokens in it, measured while the scheduler runs."""

_LEARN, _FORGET = 0.3, 0.01
_OUTLIER = 2.0  # a measurement counts as at most this multiple of what was expected


class StepCosts:
    """Seconds of steps that run one token for each of n requests, and of steps with drafts by their number of tokens.

    A step with drafts that was never measured is expected to cost as its neighbours say. The widest one that was
    measured, or else the step without drafts, grows by ``SLOPE`` of itself for each further token. A measured cost
    slowly returns to this expectation, so that one slow run does not exclude a width for ever.
    """

    SLOPE = 0.04

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}
        self._drafted: dict[int, float] = {}

    def plain(self, requests: int) -> float | None:
        """None: not measured."""
        return self._plain.get(requests)

    def add_plain(self, requests: int, seconds: float) -> None:
        old = self._plain.get(requests)
        self._plain[requests] = seconds if old is None else old + (seconds - old) * _LEARN
        for tokens, cost in self._drafted.items():
            self._drafted[tokens] = cost + (self._guess(requests, tokens) - cost) * _FORGET

    def add_drafted(self, requests: int, tokens: int, seconds: float) -> None:
        """The first run of a width can be slow, because memory is allocated. So it is blended with the expectation."""
        if requests not in self._plain:
            self._drafted[tokens] = seconds
            return
        old = self.drafted(requests, tokens)
        self._drafted[tokens] = old + (min(seconds, _OUTLIER * old) - old) * _LEARN

    def drafted(self, requests: int, tokens: int) -> float:
        """Expected seconds of a step with this many tokens for this many requests, whose plain step was measured."""
        known = self._drafted.get(tokens)
        if known is not None:
            return known
        points = sorted({**self._drafted, requests: self._plain[requests]}.items())
        below = [point for point in points if point[0] < tokens]
        above = [point for point in points if point[0] > tokens]
        if not below:
            return above[0][1]
        at, seconds = below[-1]
        if not above:
            return seconds + (tokens - at) * self.SLOPE * self._plain[requests]
        share = (tokens - at) / (above[0][0] - at)
        return seconds + share * (above[0][1] - seconds)

    def _guess(self, requests: int, tokens: int) -> float:
        return self._plain[requests] * (1 + max(0, tokens - requests) * self.SLOPE)


class Allowance:
    """Limits what trying a draft that may not pay can cost: 1 % of the steps without drafts.

    Unit: a step without drafts.
    """

    _SHARE, _MOST = 0.01, 20.0

    def __init__(self) -> None:
        self._left = 0.0

    def add_plain(self) -> None:
        self._left = min(self._left + self._SHARE, self._MOST)

    def allows(self, cost: float) -> bool:
        return self._left >= cost

    def spend(self, cost: float) -> None:
        """A negative cost is a gain."""
        self._left = min(max(self._left - cost, -self._MOST), self._MOST)
