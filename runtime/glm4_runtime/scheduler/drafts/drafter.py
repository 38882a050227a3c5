"""The interface of a drafter."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm4_runtime.arrays import Ids

if TYPE_CHECKING:
    from glm4_runtime.scheduler.job import Job


@dataclass(frozen=True, eq=False)
class Offer:
    """What a drafter could draft for a job.

    Attributes:
        drafter: makes the draft.
        kind: drafts of one kind have one chance of being right.
        most: maximum number of tokens.
        ids: the tokens, if they cost nothing. None: :meth:`Drafter.draft` computes them.
        lag: number of tokens that the drafter has to run before it can draft.
    """

    drafter: "Drafter"
    kind: str
    most: int
    ids: Ids | None = None
    lag: int = 0


@dataclass(frozen=True, eq=False)
class Draft:
    """Tokens that may follow a job's last token, int64 [count], from one offer."""

    offer: Offer
    ids: Ids


class Drafter(abc.ABC):
    """Guesses the next tokens of running jobs. Only the scheduler's thread calls it.

    Attributes:
        name: of this drafter in the statistics.
        kinds: the chance that a token is right, for each kind of draft, before anything is known.
    """

    name: str
    kinds: Mapping[str, float]

    @abc.abstractmethod
    def offer(self, job: "Job") -> Offer | None:
        """What could be drafted now. None: nothing. Costs little, and runs no model."""

    @abc.abstractmethod
    def draft(self, wanted: Mapping["Job", int]) -> dict["Job", Ids]:
        """Draft at most this many tokens for each job, all in the same steps. A job may be missing in the result."""

    def seconds(self, jobs: int, width: int) -> float | None:  # noqa: ARG002  of drafters that run a model
        """Expected time to draft ``width`` tokens for each of ``jobs``. None: not measured yet."""
        return 0.0

    def catch_up(self, jobs: Sequence["Job"], tokens: int) -> None:  # noqa: B027  lookup has nothing to do
        """Run at most this many tokens of the jobs' texts, so that their drafts can begin."""

    def forget(self, job: "Job") -> None:  # noqa: B027  lookup has nothing to do
        """The job has ended or lost its slot."""

    def close(self) -> None:  # noqa: B027  lookup has nothing to do
        """Free memory."""
