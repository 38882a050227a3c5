"""Prompt lookup: after the same few tokens, a text often continues in the same way (Saxena, "Prompt Lookup Decoding",
2023). The guess costs nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from glm4_runtime.arrays import Ids
from glm4_runtime.scheduler.drafts.drafter import Drafter, Offer

if TYPE_CHECKING:
    from glm4_runtime.scheduler.job import Job

SHORTEST_MATCH = 2
LONG_MATCH = 6  # maximum match length; a match of this length is much more likely to continue
WIDEST = 32


@dataclass(frozen=True)
class Match:
    """Tokens that may follow, because the ``matched`` tokens before them occurred earlier in the text."""

    ids: Ids
    matched: int


def look_up(ids: Ids, count: int) -> Match | None:
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
    return Match(ids[start + np.arange(count) % (len(ids) - start)], matched)


class Lookup(Drafter):
    """Drafts from a job's own text."""

    name = "lookup"
    kinds: Mapping[str, float] = {"short match": 0.5, "long match": 0.8}

    def offer(self, job: "Job") -> Offer | None:
        match = look_up(job.ids, WIDEST)
        if match is None:
            return None
        kind = "long match" if match.matched >= LONG_MATCH else "short match"
        return Offer(self, kind, WIDEST, match.ids)

    def draft(self, wanted: Mapping["Job", int]) -> dict["Job", Ids]:  # noqa: ARG002  offers hold the tokens
        return {}
