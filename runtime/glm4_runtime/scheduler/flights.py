"""Decode steps that have begun and not ended, where the stages of a model overlap."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence

from glm4_runtime.scheduler.groups import Grouping
from glm4_runtime.scheduler.job import Job
from glm4_runtime.scheduler.slots import LeasedStep, Slots


class Flights:
    """Groups of requests that decode in turn: while one works in the last stage, the next works in the first."""

    def __init__(self, slots: Slots, stages: int) -> None:
        self._slots, self._grouping = slots, Grouping(stages)
        self._begun: deque[LeasedStep] = deque()
        self._landed_at: float | None = None  # when the last step ended, if only decoding has run since

    def __len__(self) -> int:
        return len(self._begun)

    def disturbed(self) -> None:
        """State that other work than decoding runs, so that the time of the next step is no measurement."""
        self._landed_at = None

    def parts(self, decoding: Sequence[Job]) -> Iterator[Sequence[Job]]:
        """The groups of jobs whose steps begin now. Jobs beyond them wait for the next group."""
        self._requests = len(decoding) + sum(map(len, self._begun))
        self._groups = self._grouping.groups(self._requests)
        if self._groups == 1 and self._begun:
            return  # the jobs join those that are under way
        size = math.ceil(self._requests / self._groups)
        free = max(0, self._groups - len(self._begun))
        yield from (
            decoding[start : start + size] for start in range(0, min(len(decoding), size * free), size)
        )

    def begin(self, jobs: Sequence[Job]) -> None:
        """Begin a step. Raises its errors if they are known at once."""
        self._begun.append(self._slots.begin_decode([job.lease for job in jobs if job.lease is not None]))

    def next(self) -> LeasedStep:
        """The step that began first."""
        return self._begun.popleft()

    def landed(self, tokens: int) -> None:
        """State that a step has ended."""
        now, before = time.perf_counter(), self._landed_at
        if before is not None and tokens:
            self._grouping.measured(self._requests, self._groups, (now - before) / tokens)
        self._landed_at = now
