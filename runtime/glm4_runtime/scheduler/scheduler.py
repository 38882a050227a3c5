"""The scheduler: a thread that takes requests from a bounded queue and runs them together, step by step."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

from glm4_runtime.errors import BusyError, Glm4Error, QueueFullError, RequestError, StoppedError
from glm4_runtime.generate import Continuation, Vocabulary
from glm4_runtime.prefix_store.store import PrefixStore
from glm4_runtime.scheduler.api import MOST_TOP_LOGPROBS, Event, Failed, Request, SchedulerStats
from glm4_runtime.scheduler.batch import Batch
from glm4_runtime.scheduler.drafts import Drafter
from glm4_runtime.scheduler.drafts.lookup import Lookup
from glm4_runtime.scheduler.drafts.model import ModelDrafter
from glm4_runtime.scheduler.failures import model_error, overdue
from glm4_runtime.scheduler.figures import Figures
from glm4_runtime.scheduler.job import Job, Ticket
from glm4_runtime.scheduler.policy import BatchRules, retry_after
from glm4_runtime.scheduler.view import SchedulerView, view_of
from glm4_runtime.session import Session

logger = logging.getLogger(__name__)


class _Errand:
    """Work between two steps, and its end."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self.done = work, Future[None]()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


class Scheduler:
    """Continuous batching on one session. Only the scheduler uses the session between :meth:`start` and :meth:`stop`."""

    def __init__(
        self,
        session: Session,
        *,
        step_tokens: int = 512,
        max_queue: int = 64,
        prefix_cache: bool = True,
        speculation: bool = True,
        store: PrefixStore | None = None,
        draft: Session | None = None,
    ) -> None:
        """
        Args:
            step_tokens: maximum tokens of one step, prompts and decoding together. A lower number shortens the pauses
                of other requests while a long prompt is read.
            max_queue: maximum number of requests that wait for a slot.
            prefix_cache: whether slots keep their contents for prompts with the same prefix.
            speculation: whether drafts from their own texts may speed up requests.
            store: the prefix cache on disk; :meth:`stop` closes the store.
            draft: a smaller model with the same tokens, which drafts, too; :meth:`stop` closes the session. If the
                draft model fails, the scheduler goes on without it.
        """
        if session.manifest.task != "causal-lm":
            raise RequestError(
                f"this bundle was exported for {session.manifest.task}; a scheduler needs causal-lm"
            )
        for name, value in (("step_tokens", step_tokens), ("max_queue", max_queue)):
            if value < 1:
                raise RequestError(f"{name} is {value}, but must be at least 1")
        self._session, self._max_queue = session, max_queue
        # the tokenizer is read here, once, because a session belongs to one thread
        self._vocabulary = Vocabulary.of(session.manifest.model, session.tokenizer)
        self._figures = Figures()
        self._news = threading.Event()
        self._lock = threading.Lock()
        self._queue: deque[Job] = deque()
        self._closed_at: float | None = None  # when the remaining requests fail
        self._thread: threading.Thread | None = None
        self._asleep = False
        self._step_began: float | None = None
        rules = BatchRules(step_tokens, prefix_cache, most_parked=max_queue)
        drafters: list[Drafter] = [Lookup()] if speculation else []
        if draft is not None:
            drafters.append(ModelDrafter(draft))
        self._errands: deque[_Errand] = deque()
        self._adapters = set(session.adapters)  # that new requests may name
        self._batch = Batch(session, self._figures, self._wake, rules, store, drafters)
        self._store = store

    def start(self) -> None:
        """Start the thread. Requests may be submitted before."""
        if self._thread is not None:
            raise RuntimeError("a scheduler starts once")
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        """Queue a request, from any thread. ``on_event`` runs on the scheduler's thread and must not block.

        Raises:
            RequestError: it cannot be served. QueueFullError: try again after its ``retry_after``.
            StoppedError: the scheduler is stopping.
        """
        if request.top_logprobs and not request.logprobs:
            raise RequestError(f"top_logprobs is {request.top_logprobs}, but must be 0 without logprobs")
        if not 0 <= request.top_logprobs <= MOST_TOP_LOGPROBS:
            raise RequestError(
                f"top_logprobs is {request.top_logprobs}, but must be between 0 and {MOST_TOP_LOGPROBS}"
            )
        if not 0 <= (request.prompt_logprobs or 0) <= MOST_TOP_LOGPROBS:
            raise RequestError(
                f"prompt_logprobs is {request.prompt_logprobs}, but must be between 0 and {MOST_TOP_LOGPROBS}"
            )
        # the last token needs no room in the cache; with it, prompt and output fill the model's length
        room = self._session.max_seq_len - request.generates
        continuation = Continuation(
            request.prompt_ids,
            request.params,
            self._vocabulary,
            room,
            mask=request.mask,
            top_logprobs=request.top_logprobs if request.logprobs else None,
        )
        continuation.repeat(request.generated)
        job = Job(request, continuation, Ticket(on_event, self._wake))
        with self._lock:
            if self._closed_at is not None:
                raise StoppedError("the scheduler is stopping and takes no more requests")
            if request.adapter is not None and request.adapter not in self._adapters:
                raise RequestError(f"no adapter {request.adapter!r} is loaded")
            if len(self._queue) >= self._max_queue:
                wait = retry_after(self._session.max_batch_size, self._figures.seconds_per_request)
                raise QueueFullError(
                    f"{len(self._queue)} requests are waiting already; try again in {wait:g} s", wait
                )
            self._queue.append(job)
        self._wake()
        return job.ticket

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load a LoRA adapter between two steps. Callable from any thread; blocks until it is loaded.

        Raises:
            BundleError: the bundle takes no adapters. CheckpointError: the adapter is damaged or does not fit.
            RequestError: the name is taken, or all slots are. StoppedError: the scheduler is stopping.
        """
        self._between_steps(lambda: self._session.load_adapter(name, folder))
        with self._lock:
            self._adapters.add(name)

    def unload_adapter(self, name: str) -> None:
        """Free a LoRA adapter between two steps. Callable from any thread; blocks until it is freed.

        Raises:
            RequestError: no such adapter. BusyError: requests with this adapter wait or run.
            StoppedError: the scheduler is stopping.
        """
        self._between_steps(lambda: self._unload(name))

    def _unload(self, name: str) -> None:
        with self._lock:
            count = sum(job.adapter == name for job in (*self._queue, *self._batch))
            if count:
                raise BusyError(f"{count} requests have the adapter {name!r}; unload it when they have ended")
            self._adapters.discard(name)
        self._batch.forget(name)
        self._session.unload_adapter(name)

    def _between_steps(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the scheduler's thread, and wait for it."""
        errand = _Errand(work)
        with self._lock:
            if self._closed_at is not None:
                raise StoppedError("the scheduler is stopping")
            self._errands.append(errand)
        self._wake()
        if self._thread is None:
            self._run_errands()
        errand.done.result()

    def _run_errands(self) -> None:
        while self._errands:
            self._errands.popleft().run()

    def stop(self, drain: float | None = None) -> None:
        """Refuse new requests and let running ones finish, for at most ``drain`` seconds if given. Then fail the
        rest, free all slots and join the thread."""
        with self._lock:
            self._closed_at = math.inf if drain is None else time.monotonic() + drain
        self._wake()
        if self._thread is None:
            self._end_everything(StoppedError("the scheduler never started"))
        else:
            self._thread.join()
        if self._store is not None:
            self._store.close()

    def stats(self) -> SchedulerStats:
        """The current statistics; callable from any thread."""
        batch = self._batch
        return self._figures.snapshot(
            len(self._queue), batch.running, len(batch) - batch.running, self._session.max_batch_size
        )

    def stats_by_replica(self) -> Mapping[str, SchedulerStats]:
        """Empty: a scheduler has no replicas."""
        return {}

    @property
    def ready(self) -> bool:
        return self._closed_at is None and self._session.usable

    def view(self) -> SchedulerView:
        """All requests and all slots, for debugging and for checks between two steps."""
        return view_of(self._queue, self._batch, self._batch.owners)

    @property
    def asleep(self) -> bool:
        """Whether the thread waits for a change or a deadline."""
        return self._asleep

    @property
    def step_seconds(self) -> float:
        """How long the current step has been running; 0 between steps. Callable from any thread."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def _wake(self) -> None:
        """Wake the thread after a change; callable from any thread."""
        self._news.set()

    # The thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            # Cleared before anything is read: a later change sets it again, and ends the wait below.
            self._news.clear()
            more = self.step()
            if self._done():
                break
            if not more:
                self._asleep = True
                self._news.wait(self._patience())
                self._asleep = False
        self._end_everything(StoppedError("the scheduler stopped before the request was done"))

    def step(self) -> bool:
        """Admit requests while there is room, and run all once. False if there is nothing to do before a change or a
        deadline."""
        self._step_began = time.monotonic()
        try:
            self._run_errands()
            self._leave_queue()
            self._admit()
            self._batch.step()
        except BaseException as error:
            # A bug, or a panic in an extension: the thread must survive it.
            logger.exception("a step failed as a whole; the requests in it are failed")
            self._batch.fail_all(model_error(error), "failed")
        finally:
            self._step_began = None
        return bool(self._queue and self._batch.places) or not self._batch.waits

    def _leave_queue(self) -> None:
        """Remove cancelled and overdue requests from the queue."""
        now = time.monotonic()
        with self._lock:
            over = [job for job in self._queue if job.ticket.cancelled or job.overdue(now)]
            for job in over:
                self._queue.remove(job)
        for job in over:
            self._figures.requests["cancelled" if job.ticket.cancelled else "timeout"] += 1
            job.ticket.tell(Failed(overdue(job)))

    def _admit(self) -> None:
        self._batch.make_room(len(self._queue))
        with self._lock:
            for _ in range(min(self._batch.room, len(self._queue))):
                self._batch.admit(self._queue.popleft())

    def _done(self) -> bool:
        with self._lock:
            if self._closed_at is None:
                return False
            empty = not self._queue and not len(self._batch)
            return empty or time.monotonic() >= self._closed_at

    def _patience(self) -> float | None:
        """Seconds until the next deadline or the end of a drain; None if there is none."""
        with self._lock:
            deadlines = [job.request.deadline for job in (*self._queue, *self._batch)]
            times = [at for at in (*deadlines, self._closed_at) if at is not None and at < math.inf]
        return min(max(0.0, min(times) - time.monotonic()), threading.TIMEOUT_MAX) if times else None

    def _end_everything(self, error: Glm4Error) -> None:
        self._batch.fail_all(error, "stopped")
        self._batch.close()
        with self._lock:
            queued = list(self._queue)
            self._queue.clear()
        for job in queued:
            self._figures.requests["stopped"] += 1
            job.ticket.tell(Failed(error))
        while self._errands:
            self._errands.popleft().done.set_exception(error)
