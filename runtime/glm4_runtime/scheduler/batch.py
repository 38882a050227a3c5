"""The running requests, and one step of the model for all of them. Only the scheduler's thread uses this module."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from glm4_runtime.errors import Glm4Error
from glm4_runtime.generate import Logits
from glm4_runtime.prefix_store.piece import TOKENS
from glm4_runtime.prefix_store.store import PrefixStore
from glm4_runtime.scheduler.api import Event, Failed, Generated, Started
from glm4_runtime.scheduler.drafts import Draft, Drafter, Drafting
from glm4_runtime.scheduler.failures import model_error, overdue, unread
from glm4_runtime.scheduler.figures import Figures
from glm4_runtime.scheduler.flights import Flights
from glm4_runtime.scheduler.job import Job, Pending
from glm4_runtime.scheduler.policy import BatchRules, prefill_budget, shares
from glm4_runtime.scheduler.rows import Rows
from glm4_runtime.scheduler.slots import Kept, Lease, Slots
from glm4_runtime.scheduler.stored import StoredPrefixes, close
from glm4_runtime.scoring import rows_per_run
from glm4_runtime.session import Session

logger = logging.getLogger(__name__)

# Several threads, so that one slow mask does not delay the others.
_MASK_THREADS = 4
# After these outcomes the slot's contents may be corrupt.
_SPOILING = ("failed", "stopped")


class Batch:
    """The jobs that share a session's slots, in order of arrival.

    A job stays in the list of live jobs until :meth:`_end` removes the job, releases its slot and tells its listener.
    Live jobs run or are parked: at most as many run as there are slots, and a parked job has no slot.
    Each phase of a step selects its jobs from the current list and handles each job once. An error of one job ends
    this job only.
    """

    def __init__(
        self,
        session: Session,
        figures: Figures,
        wake: Callable[[], None],
        rules: BatchRules,
        store: PrefixStore | None = None,
        drafters: Sequence[Drafter] = (),
    ) -> None:
        self._session, self._figures, self._wake, self._rules = session, figures, wake, rules
        self._slots = Slots(session, rules.prefix_cache)
        self._stored = None if store is None else StoredPrefixes(store, self._slots, figures, wake)
        self._drafting = Drafting(drafters, several=session.takes_wide_batches)
        self._flights = Flights(self._slots, session.pipeline_depth) if session.pipeline_depth > 1 else None
        self._masks: Executor | None = None
        self._live: list[Job] = []

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._live)

    @property
    def running(self) -> int:
        """The number of jobs that are not parked."""
        return sum(not job.parked for job in self._live)

    @property
    def room(self) -> int:
        """The number of sequences that can be admitted now."""
        return self._session.max_batch_size - self.running

    @property
    def places(self) -> int:
        """The number of sequences that could be admitted after :meth:`make_room`."""
        return self.room + sum(job.may_be_parked for job in self._live)

    @property
    def waits(self) -> bool:
        """Whether all jobs wait: for a mask, for a client to read, or for a slot."""
        returning = any(job.returns for job in self._live)
        return not self._flights and all(job.waits for job in self._live) and not (returning and self.places)

    def make_room(self, wanted: int) -> None:
        """Give slots of clients that do not read to parked jobs that return, and to ``wanted`` new jobs.

        The jobs with the fewest tokens are parked first, because they cost least to compute again.
        """
        returning = [job for job in self._live if job.returns]
        lagging = sorted((job for job in self._live if job.may_be_parked), key=lambda job: len(job.ids))
        for job in lagging[: max(0, len(returning) + wanted - self.room)]:
            self._park(job)
        for job in returning[: self.room]:
            job.resume()

    @property
    def owners(self) -> Sequence[Lease | Kept | None]:
        """The owner of each slot."""
        return self._slots.owners

    def admit(self, job: Job) -> None:
        job.admitted_at = time.monotonic()
        self._live.append(job)

    def step(self) -> None:
        """Run the model once for every job that can go on."""
        began, model_seconds = time.perf_counter(), self._figures.model_seconds
        self._end_what_is_over()
        self._settle_masks()
        tokens = self._decode([job for job in self._live if job.decodes])
        self._prefill(tokens)
        if self._stored is not None:  # what slots held before their prompts came
            self._stored.save([job for job in self._live if not job.rest], 1)
        self._settle_masks()
        if self._figures.model_seconds > model_seconds:
            self._figures.steps += 1
            self._figures.step_seconds += time.perf_counter() - began

    def forget(self, adapter: str) -> None:
        """Free the cached slots of an adapter."""
        self._slots.forget(adapter)

    def fail_all(self, error: Glm4Error, outcome: str) -> None:
        """End every job and free every slot, also after a step that failed halfway."""
        for job in list(self._live):
            self._end(job, outcome, Failed(error))
        self._slots.close()

    def close(self) -> None:
        """Free the cached slots and the drafters, and stop the mask threads. Does not wait for a mask that is being
        computed."""
        self._slots.close()
        self._drafting.close()
        if self._masks is not None:
            self._masks.shutdown(wait=False, cancel_futures=True)

    # The parts of a step ----------------------------------------------------------------------

    def _end_what_is_over(self) -> None:
        now = time.monotonic()
        for job in list(self._live):
            if job.ticket.cancelled:
                self._end(job, "cancelled")
            elif job.overdue(now):
                self._end(job, "timeout", Failed(overdue(job)))

    def _decode(self, decoding: Sequence[Job]) -> int:
        """Run the last token of each job, and a draft behind it if drafts pay; take the tokens that follow.

        Returns:
            The number of tokens that ran.
        """
        if self._flights is not None and (self._flights or len(decoding) > 1):
            self._decode_in_turn(self._flights, decoding)
            return len(decoding)
        if not decoding:
            return 0
        longest = max(job.fed for job in decoding)
        with self._in_model():
            drafts = self._drafting.drafts(
                decoding, self._session.max_seq_len - longest - 1, self._rules.step_tokens
            )
        return self._run(decoding, drafts)

    def _decode_in_turn(self, flights: Flights, decoding: Sequence[Job]) -> None:
        """Begin the next step of each group that waits, and end the step that began first."""
        for jobs in flights.parts(decoding):
            try:
                with self._in_model():
                    flights.begin(jobs)
            except BaseException as error:  # a panic in an extension is no Exception
                self._run_apart(jobs, {}, error)
        if not flights:
            return
        step = flights.next()
        by_lease = {job.lease: job for job in self._live if job.lease is not None}
        try:
            with self._in_model():
                leases, logits = step.result()
        except BaseException as error:
            left = [by_lease[lease] for lease in step.by_slot.values() if lease in by_lease]
            self._run_apart(left, {}, error)
            return
        flights.landed(len(leases))
        there = [number for number, lease in enumerate(leases) if lease in by_lease]
        self._take_all([by_lease[leases[number]] for number in there], logits[there][:, None], {})

    def _run(self, jobs: Sequence[Job], drafts: Mapping[Job, Draft]) -> int:
        """Run jobs together. After a failed run, which changes no slot: without drafts, then one by one, so that only
        the cause ends."""
        tokens = {job.lease: [job.last, *self._drafted(drafts.get(job))] for job in jobs if job.lease}
        before = self._figures.model_seconds
        try:
            with self._in_model():
                leases, logits = self._slots.run(tokens)
        except BaseException as error:  # a panic in an extension is no Exception
            self._run_apart(jobs, drafts, error)
            return len(jobs)
        self._drafting.stepped(jobs, list(drafts.values()), self._figures.model_seconds - before)
        for lease in leases:
            lease.fed += 1
        by_lease = {job.lease: job for job in jobs}
        self._take_all([by_lease[lease] for lease in leases], logits, drafts)
        return len(jobs) * int(logits.shape[1])

    def _run_apart(self, jobs: Sequence[Job], drafts: Mapping[Job, Draft], error: BaseException) -> None:
        if drafts:
            logger.error("drafts could not be verified; the step runs without them", exc_info=error)
            self._run(jobs, {})
            return
        if not jobs:
            return
        if len(jobs) > 1:
            for job in jobs:
                self._run([job], {})
            return
        (job,) = jobs
        if job.pending is not None:  # the mask may end the job, and then this step is not needed
            job.pending.runs_ahead = False
        else:
            self._fail(job, error)

    @staticmethod
    def _drafted(draft: Draft | None) -> list[int]:
        return [] if draft is None else draft.ids.tolist()

    def _prefill(self, decoding: int) -> None:
        waiting = [job for job in self._live if job.rest and not job.parked]
        begun = [job for place, job in enumerate(waiting) if self._begun(job, waiting[:place])]
        budget = prefill_budget(self._rules.step_tokens, decoding)
        reading = sum(job.stored is not None and job.stored.reading is not None for job in begun)
        pieces = max(1, budget // TOKENS // max(1, reading))
        computed = [job for job in begun if not self._restores(job, pieces)]
        for job, count in zip(computed, shares([one.rest for one in computed], budget), strict=True):
            if count:
                with self._blaming(job):
                    self._feed(job, count)

    def _restores(self, job: Job, pieces: int) -> bool:
        """Put at most this many pieces from the disk into the slot. Returns whether more pieces come."""
        if self._stored is None or job.stored is None or job.stored.reading is None:
            return False
        with self._blaming(job):
            assert job.lease is not None
            self._stored.restore(job.lease, job.stored, pieces)
        return job.lease is None or job.stored.reading is not None

    def _begun(self, job: Job, before: Sequence[Job]) -> bool:
        """Lease a slot with the longest cached prefix, unless an earlier job will soon offer a longer one.

        Returns:
            Whether the job has a slot.
        """
        if job.lease is None and not self._slots.should_wait(
            job.reusable_ids,
            [other.prompt_ids for other in before if other.sharing == job.sharing],
            *job.sharing,
        ):
            with self._blaming(job):
                job.begin(self._slots.lease(job.buffer, len(job.reusable_ids), *job.sharing))
                if self._stored is not None and job.lease is not None:
                    job.stored = self._stored.begin(job.lease, job.goal, len(job.reusable_ids))
        return job.lease is not None

    def _feed(self, job: Job, count: int) -> None:
        assert job.lease is not None
        cached = job.lease.cached
        if self._flights is not None:
            self._flights.disturbed()
        with self._in_model():
            row = self._run_prompt(job, job.lease, count)
        if row is None:
            return
        if self._stored is not None and math.isfinite(row.sum()):  # otherwise keys or values may be NaN
            self._stored.save([job], -(-count // TOKENS))
        if job.rest:
            return
        if job.started:
            self._figures.recomputed_tokens += job.goal - cached
            self._take_rows(job, Rows(row[None], []))
            return
        self._figures.prompt_tokens += job.prompt
        self._figures.cached_tokens += cached
        job.started, started = True, Started(cached, job.prompt, job.scores, job.slot_seconds)
        if job.request.generates:
            job.ticket.tell(started)
            self._take_rows(job, Rows(row[None], []))
        else:
            self._end(job, "length", started)

    def _run_prompt(self, job: Job, lease: Lease, count: int) -> Logits | None:
        """Prefill the next ``count`` tokens, and score those of a prompt if the request asks for log-probabilities.

        Returns:
            Logits of the last position, float32 [vocab]. None if nobody needs them.
        """
        scores = job.to_score
        if scores is None and count < job.rest and self._stored is None:
            self._slots.feed(lease, count, "none")
            return None
        if scores is None:
            only: Logits = self._slots.feed(lease, count)[0]
            return only
        step = rows_per_run(self._session.manifest.model.vocab_size, self._session.prefill_chunk)
        for start in range(lease.fed, stop := lease.fed + count, step):
            rows = self._slots.feed(lease, min(step, stop - start), "all")
            scores.take(start, rows)
        last: Logits = rows[-1]
        return last

    @contextmanager
    def _in_model(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._figures.model_seconds += time.perf_counter() - began

    # Tokens, masks and endings ------------------------------------------------------------------

    def _take_all(self, jobs: Sequence[Job], logits: Logits, drafts: Mapping[Job, Draft]) -> None:
        """Choose the next tokens of each job from its logits [width, vocab]. One argmax serves all greedy jobs."""
        highest = logits.argmax(axis=2).tolist()
        for job, rows, best in zip(jobs, logits, highest, strict=True):
            draft = drafts.get(job)
            count = 1 if draft is None else 1 + len(draft.ids)
            try:  # like :meth:`_blaming`, but a microsecond faster
                self._take_rows(job, Rows(rows[:count], best, draft, len(jobs)))
            except BaseException as error:
                self._fail(job, error)

    def _take_rows(self, job: Job, rows: Rows) -> None:
        """Choose tokens from rows in order. If a mask is not ready, store the rest for later."""
        while True:
            if job.pending is not None:
                job.pending.rows = rows.kept()
                return
            self._take(job, rows)
            if rows.draft is None:
                self._drafting.compared(job, job.last)
                return
            goes_on = rows.next(job.last)
            if not goes_on or job.lease is None:
                break
            job.lease.fed += 1
        self._figures.drafted(rows.draft, rows.at)
        self._drafting.judged(job, rows.draft, rows.at, rows.wrong and not goes_on, rows.jobs)
        if job.lease is not None:
            self._slots.cut(job.lease)

    def _take(self, job: Job, rows: Rows) -> None:
        """Choose the next token from the current row of logits [vocab]."""
        row, choice = rows.logits[rows.at], job.continuation
        taken = None
        if choice.takes_the_highest and rows.highest:
            token = rows.highest[rows.at]
            # argmax returns NaN and infinities first; the sampler raises the error for them
            taken = choice.accept(row, token) if math.isfinite(row[token]) else None
        taken = taken or choice.take(row)
        chosen = choice.add(taken)
        job.append(chosen.id)
        self._figures.generated_tokens += 1
        generated = Generated(chosen, taken.top)
        if chosen.finish_reason is not None:
            self._end(job, chosen.finish_reason, generated)
        elif job.request.mask is None:
            job.ticket.tell(generated)
        else:
            job.pending = Pending.begun(generated, job.request.mask, self._mask_threads())
            job.pending.mask.add_done_callback(lambda _: self._wake())

    def _settle_masks(self) -> None:
        """For each mask that is ready: deliver the pending token, and choose the next one if its logits are there."""
        for job in [job for job in self._live if job.settles]:
            with self._blaming(job):
                self._settle(job)

    def _settle(self, job: Job) -> None:
        pending, job.pending = job.pending, None
        assert pending is not None
        assert job.request.mask is not None
        told = replace(pending.told, mask_seconds=pending.mask.result())
        if job.request.mask.finished:
            token = job.continuation.ended_by_mask(told.token)
            self._end(job, str(token.finish_reason), replace(told, token=token))
            return
        job.ticket.tell(told)
        if pending.rows is not None:
            self._take_rows(job, pending.rows)

    def _mask_threads(self) -> Executor:
        if self._masks is None:
            self._masks = ThreadPoolExecutor(_MASK_THREADS, "token-mask")
        return self._masks

    @contextmanager
    def _blaming(self, job: Job) -> Iterator[None]:
        """Any error inside the ``with`` block ends this job."""
        try:
            yield
        except BaseException as error:  # a panic in an extension is no Exception
            self._fail(job, error)

    def _fail(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, Glm4Error):
            logger.error("a request failed within a step", exc_info=error)
        self._end(job, "failed", Failed(model_error(error)))

    def _end(self, job: Job, outcome: str, event: Event | None = None) -> None:
        """Release the slot and tell the listener. The slot's prefix stays cached unless it may be corrupt."""
        self._live.remove(job)
        self._figures.ended(outcome, job.slot_seconds)
        pending, job.pending = job.pending, None
        if pending is not None:
            pending.mask.cancel()
        self._release(job, keep=outcome not in _SPOILING)
        if event is not None:
            job.ticket.tell(event)

    def _park(self, job: Job) -> None:
        """Take the slot of a job until its client reads again. Too many parked jobs: end the one parked for longest."""
        job.park()
        self._figures.preemptions += 1
        self._release(job, keep=True)
        parked = [one for one in self._live if one.parked]
        if len(parked) > self._rules.most_parked:
            unreading = [one for one in parked if one.ticket.lagging]  # none, if all clients have just read
            longest = min(unreading, key=lambda one: one.parked_at or 0.0, default=None)
            if longest is not None:
                self._end(longest, "timeout", Failed(unread(longest)))

    def _release(self, job: Job, *, keep: bool) -> None:
        lease, job.lease = job.lease, None
        self._drafting.forget(job)
        close([job.stored])
        job.stored = None
        if lease is not None:
            try:
                self._slots.end(lease, keep=keep)
            except BaseException:
                logger.exception("slot %d is emptied before its next use", lease.slot)
