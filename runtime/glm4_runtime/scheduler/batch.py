"""The requests that have a slot, and one step of all of them. Driven by one thread, the scheduler's."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from glm4_runtime.errors import DeadlineError, Glm4Error, ModelError
from glm4_runtime.generate import Logits
from glm4_runtime.scheduler.api import Event, Failed, Generated, Started
from glm4_runtime.scheduler.drafts import WIDTHS, Speculation, look_up
from glm4_runtime.scheduler.figures import Figures
from glm4_runtime.scheduler.job import Job, Pending
from glm4_runtime.scheduler.policy import prefill_budget, shares
from glm4_runtime.scheduler.prefix_cache import Ids
from glm4_runtime.scheduler.slots import Lease, Slots
from glm4_runtime.scoring import rows_per_run
from glm4_runtime.session import Session

logger = logging.getLogger(__name__)

# Enough that one slow mask does not hold up the others.
_MASK_THREADS = 4
# What may have spoilt a slot's contents.
_SPOILING = ("failed", "stopped")


class Batch:
    """Jobs, in order of arrival, over the slots of a session.

    A job is in the list of live jobs until it ends, and :meth:`_end` is its only way out: it gives up the slot and
    tells the listener. Each part of a step takes the jobs that it is for from the list as it is by then, and each
    job once. What fails for one job ends this job, and the others go on.
    """

    def __init__(
        self,
        session: Session,
        figures: Figures,
        wake: Callable[[], None],
        *,
        step_tokens: int,
        prefix_cache: bool,
        speculation: bool,
    ) -> None:
        self._session, self._figures, self._wake = session, figures, wake
        self._step_tokens, self._speculates = step_tokens, speculation
        self._slots = Slots(session, prefix_cache)
        self._speculation = Speculation()
        self._masks: Executor | None = None
        self._live: list[Job] = []

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._live)

    @property
    def room(self) -> int:
        """How many more sequences may be admitted."""
        return self._session.max_batch_size - len(self._live)

    @property
    def waits(self) -> bool:
        """Whether no job can go on before its mask is ready, or its listener takes more."""
        return all(job.waits for job in self._live)

    def admit(self, job: Job) -> None:
        job.admitted_at = time.monotonic()
        self._live.append(job)

    def step(self) -> None:
        """Run the model once for every job that can go on."""
        began, model_seconds = time.perf_counter(), self._figures.model_seconds
        self._end_what_is_over()
        self._settle_masks()
        decoding = [job for job in self._live if job.decodes]
        self._decode_or_verify(decoding)
        self._prefill(len(decoding))
        self._settle_masks()
        if self._figures.model_seconds > model_seconds:
            self._figures.steps += 1
            self._figures.step_seconds += time.perf_counter() - began

    def fail_all(self, error: Glm4Error, outcome: str) -> None:
        """End every job, and free every slot, whatever a step that broke off left behind."""
        for job in list(self._live):
            self._end(job, outcome, Failed(error))
        self._slots.close()

    def close(self) -> None:
        """Free the slots that are kept, and the mask threads; a mask that is being worked out is not waited for."""
        self._slots.close()
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

    def _decode_or_verify(self, decoding: Sequence[Job]) -> None:
        """One token for each; or, for a single one whose text repeats itself, as many as a draft gets right."""
        single = (
            self._speculates and len(decoding) == len(self._live) == 1 and decoding[0].request.mask is None
        )
        if not single:
            self._decode(decoding)
            return
        job, before = decoding[0], self._figures.model_seconds
        draft = look_up(job.ids, WIDTHS[-1])
        most = job.continuation.limit - job.count - 1
        width = self._speculation.width(draft.matched, most) if draft is not None else 0
        if draft is not None and width:
            right = self._verify(job, draft.ids[:width])
            self._speculation.verified(width, self._figures.model_seconds - before)
            self._speculation.compared(draft.matched, right, int(right < width))
            return
        self._decode(decoding)
        self._speculation.decoded(self._figures.model_seconds - before)
        if draft is not None:
            right = int(job.last == draft.ids[0])
            self._speculation.compared(draft.matched, right, 1 - right)

    def _decode(self, decoding: Sequence[Job]) -> None:
        by_lease = {job.lease: job for job in decoding if job.lease is not None}
        if not by_lease:
            return
        try:
            with self._in_model():
                leases, logits = self._slots.decode(list(by_lease))
        except BaseException as error:  # a panic in an extension is no Exception
            self._decode_apart(decoding, error)
            return
        self._take_all([by_lease[lease] for lease in leases], logits)

    def _decode_apart(self, decoding: Sequence[Job], error: BaseException) -> None:
        """After a failed step, which changes no slot: one by one, those that are not the cause go on."""
        if len(decoding) > 1:
            for job in decoding:
                self._decode([job])
            return
        (job,) = decoding
        if job.pending is not None:  # its mask may end it before this step is needed
            job.pending.runs_ahead = False
        else:
            self._fail(job, error)

    def _verify(self, job: Job, draft: Ids) -> int:
        """Feed the last token and a draft in one run, and take what would have been taken one by one: the
        sampler is asked at each position in order, up to the first token that is not the draft's.

        Returns how many of the draft were right.
        """
        assert job.lease is not None
        lease, right = job.lease, 0
        try:
            with self._in_model():
                rows = self._slots.try_draft(lease, draft)
        except BaseException:
            logger.exception("a draft could not be verified; the sequence goes on without it")
            self._decode([job])
            return 0
        for row, guess in zip(rows, (*draft.tolist(), None), strict=True):
            lease.fed += 1
            self._take_all([job], row[None])
            if job.lease is None or job.last != guess:
                break
            right += 1
        if job.lease is not None:
            self._slots.cut(lease)
        self._figures.drafted_tokens += len(draft)
        self._figures.accepted_tokens += right
        return right

    def _prefill(self, decoding: int) -> None:
        waiting = [job for job in self._live if job.rest]
        begun = [job for place, job in enumerate(waiting) if self._begun(job, waiting[:place])]
        budget = prefill_budget(self._step_tokens, decoding)
        for job, count in zip(begun, shares([one.rest for one in begun], budget), strict=True):
            if count:
                with self._blaming(job):
                    self._feed(job, count)

    def _begun(self, job: Job, before: Sequence[Job]) -> bool:
        """Give the job a slot with what is known of its prompt, unless waiting will give it more."""
        if job.lease is None and not self._slots.should_wait(
            job.reusable_ids, [other.prompt_ids for other in before]
        ):
            with self._blaming(job):
                job.lease = self._slots.lease(job.buffer, len(job.reusable_ids))
        return job.lease is not None

    def _feed(self, job: Job, count: int) -> None:
        assert job.lease is not None
        cached = job.lease.cached
        with self._in_model():
            row = self._run_prompt(job, job.lease, count)
        if job.rest:
            return
        self._figures.prompt_tokens += job.prompt
        self._figures.cached_tokens += cached
        started = Started(cached, job.prompt, job.scores)
        if job.request.generates:
            job.ticket.tell(started)
            self._take(job, row)
        else:
            self._end(job, "length", started)

    def _run_prompt(self, job: Job, lease: Lease, count: int) -> Logits:
        """Run the next part of a prompt, and score it where that is asked; the logits of its last position."""
        if job.scores is None:
            only: Logits = self._slots.feed(lease, count)[0]
            return only
        step = rows_per_run(self._session.manifest.model.vocab_size, self._session.prefill_chunk)
        for start in range(lease.fed, stop := lease.fed + count, step):
            rows = self._slots.feed(lease, min(step, stop - start), "all")
            job.scores.take(start, rows)
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

    def _take_all(self, jobs: Sequence[Job], logits: Logits) -> None:
        """The next token of each job by its row; one reduction serves all that take the highest."""
        highest = logits.argmax(axis=1).tolist()
        for job, row, token in zip(jobs, logits, highest, strict=True):
            # argmax finds NaN and infinities first; the sampler says what is wrong with them
            takes_it = job.continuation.takes_the_highest and math.isfinite(row[token])
            try:  # as :meth:`_blaming`, which costs a microsecond
                self._take(job, row, token if takes_it else None)
            except BaseException as error:
                self._fail(job, error)

    def _take(self, job: Job, row: Logits, known: int | None = None) -> None:
        """The next token by a row of logits, or later where the mask for it is not ready."""
        if job.pending is not None:
            job.pending.logits = row.copy()
            return
        choice = job.continuation
        taken = choice.take(row) if known is None else choice.accept(row, known)
        token = choice.add(taken)
        job.append(token.id)
        self._figures.generated_tokens += 1
        generated = Generated(token, taken.top)
        if token.finish_reason is not None:
            self._end(job, token.finish_reason, generated)
        elif job.request.mask is None:
            job.ticket.tell(generated)
        else:
            job.pending = Pending(generated, self._mask_threads().submit(job.request.mask.advance, token.id))
            job.pending.mask.add_done_callback(lambda _: self._wake())

    def _settle_masks(self) -> None:
        """Tell the tokens whose masks are worked out, and take those that waited for them."""
        for job in [job for job in self._live if job.settles]:
            with self._blaming(job):
                self._settle(job)

    def _settle(self, job: Job) -> None:
        pending, job.pending = job.pending, None
        assert pending is not None
        assert job.request.mask is not None
        pending.mask.result()
        if job.request.mask.finished:
            token = job.continuation.ended_by_mask(pending.told.token)
            self._end(job, str(token.finish_reason), replace(pending.told, token=token))
            return
        job.ticket.tell(pending.told)
        if pending.logits is not None:
            self._take(job, pending.logits)

    def _mask_threads(self) -> Executor:
        if self._masks is None:
            self._masks = ThreadPoolExecutor(_MASK_THREADS, "token-mask")
        return self._masks

    @contextmanager
    def _blaming(self, job: Job) -> Iterator[None]:
        """Whatever fails within ends this job."""
        try:
            yield
        except BaseException as error:  # a panic in an extension is no Exception
            self._fail(job, error)

    def _fail(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, Glm4Error):
            logger.error("a request failed within a step", exc_info=error)
        self._end(job, "failed", Failed(model_error(error)))

    def _end(self, job: Job, outcome: str, event: Event | None = None) -> None:
        """Give up the slot, whose contents stay for others unless they may be spoilt, and tell the listener."""
        self._live.remove(job)
        self._figures.ended(outcome, time.monotonic() - job.admitted_at)
        lease, job.lease = job.lease, None
        pending, job.pending = job.pending, None
        if pending is not None:
            pending.mask.cancel()
        if lease is not None:
            try:
                self._slots.end(lease, keep=outcome not in _SPOILING)
            except BaseException:
                logger.exception("slot %d is emptied before its next use", lease.slot)
        if event is not None:
            job.ticket.tell(event)


def overdue(job: Job) -> DeadlineError:
    return DeadlineError(
        f"the request was not done by its deadline: {job.count} tokens were generated; "
        "allow it more time or fewer tokens"
    )


def model_error(error: BaseException) -> ModelError:
    """What a client is told of a failure within a step: one line."""
    if isinstance(error, Glm4Error):
        return ModelError(str(error))
    if isinstance(error, MemoryError):
        return ModelError("no memory for a step of the model; send shorter prompts or allow fewer slots")
    lines = str(error).splitlines() or [""]
    return ModelError(f"a step of the model failed ({type(error).__name__}: {lines[0][:200]})")
