"""The requests that have a slot, and one step of all of them. Driven by one thread, the scheduler's."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from glm4_runtime.errors import DeadlineError, Glm4Error, ModelError
from glm4_runtime.generate import Logits
from glm4_runtime.scheduler.api import Failed, Generated, Started
from glm4_runtime.scheduler.drafts import WIDTHS, Speculation, look_up
from glm4_runtime.scheduler.figures import Figures
from glm4_runtime.scheduler.job import Job
from glm4_runtime.scheduler.policy import prefill_budget, shares
from glm4_runtime.scheduler.prefix_cache import Ids, PrefixCache
from glm4_runtime.scoring import rows_per_run
from glm4_runtime.session import Session

logger = logging.getLogger(__name__)

# Enough that one slow mask does not hold up the others.
_MASK_THREADS = 4


class Batch:
    """Jobs, in order of arrival, over the slots of a session.

    Whatever fails fails the job that it belongs to: its slot is emptied, the others go on.
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
        self._cache = PrefixCache(prefix_cache)
        self._speculation = Speculation()
        self._masks: ThreadPoolExecutor | None = None
        self._live: list[Job] = []

    def __len__(self) -> int:
        return len(self._live)

    @property
    def room(self) -> int:
        """How many more sequences may be admitted."""
        return self._session.max_batch_size - len(self._live)

    def admit(self, job: Job) -> None:
        job.admitted_at = time.monotonic()
        self._live.append(job)

    def step(self) -> bool:
        """Run the model once for every job that can go on; False where none can."""
        began, model_seconds = time.perf_counter(), self._figures.model_seconds
        self._end_what_is_over()
        self._settle_masks()
        decoding = [job for job in self._live if job.decodes]
        self._decode_or_verify(decoding)
        self._prefill(len(decoding))
        self._settle_masks()
        self._live = [job for job in self._live if not job.ended]
        ran = self._figures.model_seconds > model_seconds
        if ran:
            self._figures.steps += 1
            self._figures.step_seconds += time.perf_counter() - began
        return ran

    def fail_all(self, error: Glm4Error, outcome: str) -> None:
        """Also frees every slot that is not kept, whatever a step that broke off left behind."""
        for job in self._live:
            self._fail(job, error, outcome)
        self._live = []
        for slot in set(range(self._session.max_batch_size)) - set(self._cache.kept()):
            self._session.release(slot)

    def close(self) -> None:
        """Free the slots that are kept, and the mask threads."""
        for slot in self._cache.kept():
            self._session.release(slot)
        self._cache = PrefixCache(enabled=False)
        if self._masks is not None:
            self._masks.shutdown()

    # The parts of a step ----------------------------------------------------------------------

    def _end_what_is_over(self) -> None:
        now = time.monotonic()
        for job in self._live:
            if job.ticket.cancelled:
                self._end(job, "cancelled")
            elif job.overdue(now):
                self._fail(job, overdue(job), "timeout")
        self._live = [job for job in self._live if not job.ended]

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
        if not decoding:
            return
        try:
            with self._in_model():
                slots, logits = self._session.decode_block(
                    {job.slot: job.last for job in decoding if job.slot is not None}
                )
        except Exception as error:
            # A failed run changes no slot: one by one, those that are not the cause go on.
            if len(decoding) == 1:
                self._fail_by(decoding[0], error)
            else:
                for job in decoding:
                    self._decode([job])
            return
        by_slot = {job.slot: job for job in decoding}
        for job in decoding:
            job.fed += 1
        self._take_all([by_slot[slot] for slot in slots], logits)

    def _verify(self, job: Job, draft: Ids) -> int:
        """Feed the last token and a draft in one run, and take what would have been taken one by one: the
        sampler is asked at each position in order, up to the first token that is not the draft's.

        Returns how many of the draft were right.
        """
        assert job.slot is not None
        try:
            with self._in_model():
                rows = self._session.prefill(
                    job.slot, np.concatenate((job.ids[-1:], draft)), logits=len(draft) + 1
                )
        except Exception as error:
            self._fail_by(job, error)
            return 0
        right = 0
        for row, guess in zip(rows, (*draft.tolist(), None), strict=True):
            job.fed += 1
            self._take_all([job], row[None])
            if job.ended or job.last != guess:
                break
            right += 1
        if not job.ended:
            self._session.truncate(job.slot, job.fed)
        self._figures.drafted_tokens += len(draft)
        self._figures.accepted_tokens += right
        return right

    def _prefill(self, decoding: int) -> None:
        waiting = [job for job in self._live if job.rest and not job.ended]
        begun = [job for place, job in enumerate(waiting) if self._begun(job, waiting[:place])]
        budget = prefill_budget(self._step_tokens, decoding)
        for job, count in zip(begun, shares([one.rest for one in begun], budget), strict=True):
            if count:
                self._feed(job, count)

    def _begun(self, job: Job, before: Sequence[Job]) -> bool:
        """Give the job a slot with what is known of its prompt, unless waiting will give it more."""
        if job.slot is not None:
            return True
        # Whoever ended within this step has given its slot up: it is free, or kept by the cache.
        live = {
            other.slot: other.ids[: other.fed]
            for other in self._live
            if other.slot is not None and not other.ended
        }
        if self._cache.should_wait(job.reusable_ids, live, [other.prompt_ids for other in before]):
            return False
        free = [slot for slot in self._session.free_slots() if slot not in live]
        place = self._cache.place(job.reusable_ids, live, free)
        if place.evicts:
            self._session.release(place.slot)
        try:
            if place.source == place.slot:
                self._session.truncate(place.slot, place.length)
            elif place.source is not None:
                self._session.copy_prefix(place.source, place.slot, place.length)
        except Exception as error:
            self._session.discard(place.slot)
            self._fail_by(job, error)
            return False
        job.slot = place.slot
        job.fed = job.cached = place.length
        return True

    def _feed(self, job: Job, count: int) -> None:
        assert job.slot is not None
        try:
            with self._in_model():
                row = self._run_prompt(job, job.slot, job.prompt_ids[job.fed : job.fed + count])
        except Exception as error:
            self._fail_by(job, error)
            return
        job.fed += count
        if job.rest == 0:
            self._figures.prompt_tokens += job.prompt
            self._figures.cached_tokens += job.cached
            job.ticket.tell(Started(job.cached, job.prompt, job.scores))
            if job.request.generates:
                self._take(job, row)
            else:
                self._end(job, "length")

    def _run_prompt(self, job: Job, slot: int, ids: Ids) -> Logits:
        """Run the next part of a prompt, and score it where that is asked; the logits of its last position."""
        if job.scores is None:
            only: Logits = self._session.prefill(slot, ids)[0]
            return only
        step = rows_per_run(self._session.manifest.model.vocab_size, self._session.prefill_chunk)
        for start in range(0, len(ids), step):
            logits = self._session.prefill(slot, ids[start : start + step], logits="all")
            job.scores.take(job.fed + start, logits)
        last: Logits = logits[-1]
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
            self._take(job, row, token if takes_it else None)

    def _take(self, job: Job, row: Logits, known: int | None = None) -> None:
        """The next token by a row of logits, or later where the mask for it is not ready."""
        if job.masking is not None:
            job.logits = row.copy()
            return
        try:
            choice = job.continuation
            taken = choice.take(row) if known is None else choice.accept(row, known)
            token = choice.add(taken)
        except BaseException as error:  # a panic in an extension is no Exception
            self._fail_by(job, error)
            return
        job.append(token.id)
        self._figures.generated_tokens += 1
        if token.finish_reason is not None:
            self._tell_last(job, Generated(token, taken.top))
        elif job.request.mask is None:
            job.ticket.tell(Generated(token, taken.top))
        else:
            job.held = Generated(token, taken.top)
            job.masking = self._mask_threads().submit(job.request.mask.advance, token.id)
            job.masking.add_done_callback(lambda _: self._wake())

    def _settle_masks(self) -> None:
        """Tell the tokens whose masks are worked out, and take those that waited for them."""
        for job in self._live:
            if job.masking is None or not job.masking.done() or job.ended:
                continue
            masking, job.masking = job.masking, None
            held, job.held = job.held, None
            row, job.logits = job.logits, None
            assert held is not None
            assert job.request.mask is not None
            try:
                masking.result()
                finished = job.request.mask.finished
            except BaseException as error:  # a panic in an extension is no Exception
                self._fail_by(job, error)
                continue
            if finished:
                self._tell_last(job, replace(held, token=job.continuation.ended_by_mask(held.token)))
                continue
            job.ticket.tell(held)
            if row is not None:
                self._take(job, row)

    def _mask_threads(self) -> ThreadPoolExecutor:
        if self._masks is None:
            self._masks = ThreadPoolExecutor(_MASK_THREADS, "token-mask")
        return self._masks

    def _tell_last(self, job: Job, event: Generated) -> None:
        job.ticket.tell(event)
        self._end(job, str(event.token.finish_reason))

    def _fail_by(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, Glm4Error):
            logger.error("a request failed within a step", exc_info=error)
        self._fail(job, model_error(error), "failed")

    def _fail(self, job: Job, error: Glm4Error, outcome: str) -> None:
        job.ticket.tell(Failed(error))
        self._end(job, outcome)

    def _end(self, job: Job, outcome: str) -> None:
        """Give up the slot: what is in it stays for others, unless it may be what failed."""
        job.ended = True
        job.logits = job.held = None
        self._figures.ended(outcome, time.monotonic() - job.admitted_at)
        if job.slot is None:
            return
        if outcome in ("failed", "stopped"):
            self._session.discard(job.slot)
        elif not self._cache.keep(job.slot, job.ids[: job.fed].copy()):
            self._session.release(job.slot)


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
