"""A read-only view of a scheduler: where each request is, and what each slot holds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glm4_runtime.scheduler.job import Job, Ticket
from glm4_runtime.scheduler.prefix_cache import Ids
from glm4_runtime.scheduler.slots import Kept, Lease


@dataclass(frozen=True, eq=False)
class SlotView:
    """
    Attributes:
        owner: a running request, or the prefix cache. None: nobody.
        tokens: the tokens whose keys and values the slot holds, int64, read-only.
    """

    owner: Ticket | Literal["cache"] | None
    tokens: Ids


@dataclass(frozen=True, eq=False)
class SchedulerView:
    """Each request that has not ended is waiting, running or parked.

    Attributes:
        waiting: requests that wait for their first slot, in order of arrival.
        running: admitted requests with their slots. None: the request waits for another one to read its prefix.
        parked: requests that gave their slots back until their clients read.
        slots: one entry for each slot of the session.
    """

    waiting: tuple[Ticket, ...]
    running: Mapping[Ticket, int | None]
    parked: tuple[Ticket, ...]
    slots: tuple[SlotView, ...]


def view_of(
    queue: Iterable[Job], live: Iterable[Job], owners: Sequence[Lease | Kept | None]
) -> SchedulerView:
    running = [job for job in live if not job.parked]
    tickets = {job.lease: job.ticket for job in running if job.lease is not None}
    return SchedulerView(
        waiting=tuple(job.ticket for job in queue),
        running={job.ticket: None if job.lease is None else job.lease.slot for job in running},
        parked=tuple(job.ticket for job in live if job.parked),
        slots=tuple(_slot(owner, tickets) for owner in owners),
    )


def _slot(owner: Lease | Kept | None, tickets: Mapping[Lease, Ticket]) -> SlotView:
    tokens = np.empty(0, np.int64) if owner is None else owner.held.view()
    tokens.flags.writeable = False
    return SlotView("cache" if isinstance(owner, Kept) else tickets.get(owner) if owner else None, tokens)
