"""The number of replicas by load. Decisions only: no thread, no clock and no Ray."""

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaCount:
    """The least and the most replicas; equal for a fixed number.

    Attributes:
        shrink_after: seconds for which the load must be lower before replicas end.

    Raises:
        ValueError: the least is below 1 or above the most.
    """

    least: int
    most: int
    shrink_after: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"{self.least}:{self.most} is no range of replicas")

    @classmethod
    def parse(cls, text: str) -> "ReplicaCount":
        """``4`` or ``1:8``. Raises :class:`ValueError`."""
        least, colon, most = text.partition(":")
        return cls(int(least), int(most) if colon else int(least))

    @property
    def fixed(self) -> bool:
        return self.least == self.most

    def clip(self, count: int) -> int:
        return max(self.least, min(count, self.most))


class Scaler:
    """Wants one free slot beyond the requests that run or wait. More at once, fewer after a delay.

    The number is the largest that the load needed during the last ``shrink_after`` seconds, so a short pause of the load
    ends no replica.
    """

    def __init__(self, count: ReplicaCount) -> None:
        self._count = count
        self._needed: deque[tuple[float, int]] = deque()

    def wanted(self, now: float, requests: int, slots: int) -> int:
        """The number of replicas.

        Args:
            now: seconds on a clock that does not run backwards.
            requests: that run or wait. ``slots``: of one replica.
        """
        needed = self._count.clip(requests // slots + 1)
        while self._needed and self._needed[-1][1] <= needed:
            self._needed.pop()
        self._needed.append((now, needed))
        while self._needed[0][0] < now - self._count.shrink_after:
            self._needed.popleft()
        return self._needed[0][1]
