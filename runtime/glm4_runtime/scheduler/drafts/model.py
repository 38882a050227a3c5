"""Drafts of a smaller model with the same tokens (Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding", 2023).

The draft model samples as the target does: with the request's parameters, and with the same random number at the same
position. So both often choose the same token, although they have different distributions.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from glm4_runtime.arrays import Ids, Logits
from glm4_runtime.errors import NotANumberError, QueueFullError, RequestError
from glm4_runtime.sampling import RevertibleMask
from glm4_runtime.scheduler.drafts.drafter import Drafter, Offer
from glm4_runtime.scheduler.slots import Lease, Slots
from glm4_runtime.session import Session

if TYPE_CHECKING:
    from glm4_runtime.scheduler.job import Job

logger = logging.getLogger(__name__)

WIDEST = 8
_LEARN = 0.3
_SLOW_MASK = 0.02  # seconds; drafts do without the mask of a grammar that takes longer


@dataclass(eq=False)
class _Follower:
    """The draft model's copy of one job.

    Attributes:
        lease: its slot in the draft model's session.
        tried: drafted tokens in the slot, behind the ``lease.fed`` tokens of the job.
        mask: a copy of the request's mask. None: there is no mask, or drafts do without.
        masked: number of the job's tokens that the copy has seen.
        may_copy: whether the mask may be copied.
    """

    lease: Lease
    tried: list[int] = field(default_factory=list)
    mask: RevertibleMask | None = None
    masked: int = 0
    may_copy: bool = True


class ModelDrafter(Drafter):
    """A draft model's session, with a slot for each job that it follows."""

    name = "model"
    kinds: Mapping[str, float] = {"model": 0.6}

    def __init__(self, session: Session) -> None:
        self._session, self._slots = session, Slots(session, prefix_cache=True)
        self._followers: dict[Job, _Follower] = {}
        self._first: dict[int, float] = {}  # seconds of a draft's first token, by the number of jobs
        self._next: dict[int, float] = {}  # of each further one

    def offer(self, job: "Job") -> Offer | None:
        follower, count = self._followers.get(job), len(job.ids)
        most = min(WIDEST, self._session.max_seq_len - count)
        if most < 1 or self._is_full_for(job):
            return None
        if follower is not None:
            self._settle(job, follower)
        return Offer(self, "model", most, lag=count - (0 if follower is None else follower.lease.fed))

    def catch_up(self, jobs: Sequence["Job"], tokens: int) -> None:
        for job in jobs:
            if tokens <= 0 or self._is_full_for(job):
                continue
            follower = self._follower(job)
            count = min(len(job.ids) - 1 - follower.lease.fed, tokens)
            if count > 0:
                self._slots.feed(follower.lease, count)
                tokens -= count

    def seconds(self, jobs: int, width: int) -> float | None:
        first = _nearest(self._first, jobs)
        if first is None or width == 1:
            return first
        following = _nearest(self._next, jobs)
        return first + (width - 1) * (first if following is None else following)

    def draft(self, wanted: Mapping["Job", int]) -> dict["Job", Ids]:
        drafts: dict[Job, list[int]] = {job: [] for job in wanted}
        with self._reverting(drafts):
            inputs = self._new_tokens(wanted)
            for place in range(max(wanted.values())):
                began = time.perf_counter()
                rows = self._run(inputs)
                inputs = {
                    job: [token] for job, row in rows.items() if (token := self._choose(job, row)) is not None
                }
                for job, (token,) in inputs.items():
                    drafts[job].append(token)
                _learn(self._next if place else self._first, len(rows), time.perf_counter() - began)
                inputs = {job: token for job, token in inputs.items() if len(drafts[job]) < wanted[job]}
                if not inputs:
                    break
        return {job: np.array(ids, np.int64) for job, ids in drafts.items()}

    def forget(self, job: "Job") -> None:
        follower = self._followers.pop(job, None)
        if follower is not None:
            self._slots.end(follower.lease, keep=True)

    def close(self) -> None:
        self._followers.clear()
        self._slots.close()
        self._session.close()

    # How it is done --------------------------------------------------------------------------

    def _is_full_for(self, job: "Job") -> bool:
        """Whether all slots belong to other jobs."""
        return job not in self._followers and len(self._followers) >= self._session.max_batch_size

    def _follower(self, job: "Job") -> _Follower:
        """Give a job a slot, which may begin with a prefix of an earlier job of its group."""
        if job not in self._followers:
            lease = self._slots.lease(job.buffer, len(job.ids) - 1, None, job.request.group)
            self._followers[job] = _Follower(lease)
        return self._followers[job]

    def _settle(self, job: "Job", follower: _Follower) -> None:
        """Keep those drafted tokens in the slot that the job has taken. The job's last token always runs again."""
        lease, tried, last = follower.lease, follower.tried, len(job.ids) - 1
        if not tried and lease.fed <= last:
            return
        pairs = zip(job.ids[lease.fed : last].tolist(), tried, strict=False)
        right = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        lease.fed = min(lease.fed + right, last)
        self._slots.cut(lease)
        tried.clear()

    def _new_tokens(self, wanted: Mapping["Job", int]) -> dict["Job", list[int]]:
        """The tokens of each job that the draft model has not run: one, or two after a draft that was right."""
        inputs = {}
        for job in wanted:
            lease = self._followers[job].lease
            if len(wanted) > 1 and not self._session.takes_wide_batches:
                behind = len(job.ids) - 1 - lease.fed
                if behind:
                    self._slots.feed(lease, behind)
            inputs[job] = job.ids[lease.fed :].tolist()
        return inputs

    def _run(self, inputs: Mapping["Job", Sequence[int]]) -> dict["Job", Logits]:
        """Run tokens of each job in one step; returns the logits [vocab] after the last token of each."""
        by_lease = {self._followers[job].lease: job for job in inputs}
        leases, rows = self._slots.run({lease: inputs[job] for lease, job in by_lease.items()})
        result = {}
        for lease, some in zip(leases, rows, strict=True):
            job = by_lease[lease]
            tokens, follower = inputs[job], self._followers[job]
            known = min(len(tokens), len(job.ids) - lease.fed)
            lease.fed += known
            follower.tried.extend(tokens[known:])
            result[job] = some[len(tokens) - 1]
        return result

    def _choose(self, job: "Job", row: Logits) -> int | None:
        """The token that the request's sampler takes. None: the draft ends here."""
        follower = self._followers[job]
        mask = follower.mask
        if mask is not None and mask.finished:
            return None
        try:
            token = job.continuation.sampler.choose(row, mask)
        except NotANumberError:
            raise
        except RequestError:  # the mask and the request's bias rule out all tokens
            return None
        if mask is not None:
            began = time.perf_counter()
            mask.advance(token)
            if time.perf_counter() - began > _SLOW_MASK:
                follower.mask, follower.may_copy = None, False
        return token

    @contextmanager
    def _reverting(self, drafts: Mapping["Job", Sequence[int]]) -> Iterator[None]:
        """Undo what drafting changes in samplers and masks."""
        marks = {job: self._marked(job) for job in drafts}
        try:
            yield
        finally:
            for job, tokens in drafts.items():
                job.continuation.sampler.retract(tokens)
                follower, mark = self._followers[job], marks[job]
                if follower.mask is not None and mark is not None:
                    follower.mask.go_back(mark)

    def _marked(self, job: "Job") -> object:
        """Bring the copy of the mask up to the job's last token; returns its state."""
        follower, mask = self._followers[job], job.request.mask
        if mask is None:
            return None
        if follower.mask is None:
            if not follower.may_copy or not _is_still(job) or not isinstance(mask, RevertibleMask):
                return None
            try:
                follower.mask, follower.masked = mask.copy(), len(job.ids)
            except QueueFullError:  # no memory for a copy
                follower.may_copy = False
                return None
        follower.mask.skip(job.ids[follower.masked :].tolist())
        follower.masked = len(job.ids)
        return follower.mask.mark()


def _is_still(job: "Job") -> bool:
    """Wait a little for the mask after the job's last token. Returns whether no thread is computing the mask."""
    if job.pending is None:
        return True
    done, _ = wait([job.pending.mask], timeout=_SLOW_MASK)
    return bool(done)


def _learn(seconds: dict[int, float], jobs: int, new: float) -> None:
    old = seconds.get(jobs)
    seconds[jobs] = new if old is None else old + (min(new, 2 * old) - old) * _LEARN


def _nearest(seconds: Mapping[int, float], jobs: int) -> float | None:
    """The time that was measured for the nearest number of jobs."""
    if not seconds:
        return None
    return seconds[min(seconds, key=lambda known: abs(known - jobs))]
