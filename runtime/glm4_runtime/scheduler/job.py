"""The state of one running request: its tokens, its slot, its pending token and its listener."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

from glm4_runtime.generate import Continuation
from glm4_runtime.sampling import TokenMask
from glm4_runtime.scheduler.api import Event, Generated, Request
from glm4_runtime.scheduler.prefix_cache import Ids
from glm4_runtime.scheduler.rows import Rows
from glm4_runtime.scheduler.slots import Lease
from glm4_runtime.scheduler.stored import StoredPrefix
from glm4_runtime.scoring import PromptScores

logger = logging.getLogger(__name__)


class Ticket:
    """The caller's handle on a request, and the request's way to its listener.

    The listener receives at most one last event, and no event afterwards.
    """

    def __init__(self, on_event: Callable[[Event], None], wake: Callable[[], None]) -> None:
        self._on_event, self._wake = on_event, wake
        self._lock = threading.RLock()  # reentrant: a listener may cancel from within an event
        self._cancelled = self._closed = self._held = self._lagging = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def held(self) -> bool:
        """Whether :meth:`hold` was called last."""
        return self._held

    def hold(self) -> None:
        """Pause generation; may be called from any thread. Events of the current step still arrive.

        The request keeps its slot, and its deadline stays the same.
        """
        self._held = True

    def go_on(self) -> None:
        """Resume generation after :meth:`hold`; may be called from any thread."""
        self._held = False
        self._wake()

    @property
    def lagging(self) -> bool:
        """Whether :meth:`lag` was called last."""
        return self._lagging

    def lag(self) -> None:
        """State that the client does not read; may be called from any thread.

        The request goes on while no other request needs its slot. If another one does, the request is parked.
        """
        if not self._lagging:
            self._lagging = True
            self._wake()

    def catch_up(self) -> None:
        """State that the client reads again after :meth:`lag`; may be called from any thread."""
        self._lagging = False
        self._wake()

    def cancel(self) -> None:
        """End the request; may be called from any thread. Does nothing if the request has ended already.

        No event arrives after this method returns. The slot is free within one step.
        """
        with self._lock:
            self._cancelled = self._closed = True
        self._wake()

    def tell(self, event: Event) -> None:
        """Deliver an event. If the listener raises, the request is cancelled."""
        with self._lock:
            if self._closed:
                return
            self._closed = event.last
            try:
                self._on_event(event)
            except BaseException:  # the listener's error must not end the scheduler
                logger.exception("a listener failed; its request is cancelled")
                self._cancelled = self._closed = True


@dataclass
class Pending:
    """A token that waits for the mask after it: only this mask shows whether the token is the last one.

    Attributes:
        told: the event with the token, not delivered yet.
        mask: done when the mask is computed; its seconds.
        rows: where the next tokens come from, if the model ran before the mask was ready.
        runs_ahead: whether the model may run before the mask is ready. False after such a run failed.
    """

    told: Generated
    mask: Future[float]
    rows: Rows | None = None
    runs_ahead: bool = True

    @classmethod
    def begun(cls, told: Generated, mask: TokenMask, threads: Executor) -> "Pending":
        """Begin to compute the mask after a token."""
        return cls(told, threads.submit(_advance, mask, told.token.id))


def _advance(mask: TokenMask, token: int) -> float:
    began = time.perf_counter()
    mask.advance(token)
    return time.perf_counter() - began


class Job:
    """Prompt and output of one request.

    A parked request has no slot. After its return, prefill runs its prompt and its output so far once more.

    Attributes:
        prompt: number of tokens of the prompt.
        started: whether the prompt was read, and :class:`Started` was sent, by this or an earlier run of the request.
        goal: number of tokens that prefill puts into the slot: the prompt, after a return or an earlier run also the output
            so far.
        parked_at: ``time.monotonic()`` at which the request was parked. None: it is not parked.
        scores: log-probabilities of the prompt, filled during prefill. None: the request does not ask for them.
        buffer: tokens of prompt and output, int64 [prompt + limit].
        lease: the slot, from the start of prefill until the job ends or is parked.
        stored: the prompt's part of the prefix cache on disk. None: there is none, or the prompt is too short.
        pending: the last token, while the mask after it is being computed.
    """

    def __init__(self, request: Request, continuation: Continuation, ticket: Ticket) -> None:
        self.request, self.continuation, self.ticket = request, continuation, ticket
        self.prompt = len(request.prompt_ids)
        self.buffer = np.empty(self.prompt + continuation.limit, np.int64)
        self.buffer[: self.prompt] = request.prompt_ids
        self._count = self.goal = self.prompt + len(request.generated)
        self.buffer[self.prompt : self._count] = request.generated
        self.started = bool(request.generated)
        self.scores = (
            None
            if request.prompt_logprobs is None
            else PromptScores(request.prompt_ids, request.prompt_logprobs)
        )
        self.lease: Lease | None = None
        self.stored: StoredPrefix | None = None
        self.pending: Pending | None = None
        self.admitted_at = time.monotonic()
        self.parked_at: float | None = None

    @property
    def adapter(self) -> str | None:
        return self.request.adapter

    @property
    def sharing(self) -> tuple[str | None, str]:
        """Adapter and group: jobs share prefixes if both are equal."""
        return self.request.adapter, self.request.group

    @property
    def ids(self) -> Ids:
        """Tokens of the prompt and of the output so far; a view of ``buffer``."""
        return self.buffer[: self._count]

    @property
    def prompt_ids(self) -> Ids:
        return self.buffer[: self.prompt]

    @property
    def to_score(self) -> PromptScores | None:
        """Where the scores of the prompt go while it is read for the first time. None: nothing is to be scored."""
        return None if self.started else self.scores

    @property
    def reusable_ids(self) -> Ids:
        """The tokens that may come from the prefix cache. None of them if the prompt is to be scored, because scores
        need the logits of every position."""
        return self.ids if self.to_score is None else self.ids[:0]

    @property
    def count(self) -> int:
        """Number of output tokens so far."""
        return self._count - self.prompt

    @property
    def last(self) -> int:
        return int(self.buffer[self._count - 1])

    @property
    def fed(self) -> int:
        """Number of tokens in the slot. A job that is ready to decode has all tokens but the last in its slot."""
        return 0 if self.lease is None else self.lease.fed

    @property
    def rest(self) -> int:
        """Number of tokens that prefill has yet to run."""
        return max(0, self.goal - self.fed)

    @property
    def decodes(self) -> bool:
        """Whether the job takes part in the next decode step."""
        held_back = self.pending is not None and not self.pending.runs_ahead
        fed = not self.rest and self.fed == self._count - 1
        return fed and not held_back and not self.ticket.held

    @property
    def settles(self) -> bool:
        """Whether a token is pending and its mask is ready."""
        return self.pending is not None and self.pending.mask.done()

    @property
    def waits(self) -> bool:
        """Whether the job can do nothing until its mask is ready, its client reads, a piece of its prompt is read from
        the disk, or it leaves the parked ones."""
        reads = self.rest and not (self.stored is not None and self.stored.waits)
        return not (self.settles or (not self.parked and (reads or self.decodes)))

    @property
    def parked(self) -> bool:
        return self.parked_at is not None

    @property
    def may_be_parked(self) -> bool:
        return self.started and self.ticket.lagging and not self.parked

    @property
    def returns(self) -> bool:
        """Whether the job is parked, and may have a slot again.

        A token whose mask is not ready may be the last one. After a failed run with such a token, the job waits for
        the mask.
        """
        blocked = self.pending is not None and not self.pending.runs_ahead
        return self.parked and not self.ticket.lagging and not blocked

    def begin(self, lease: Lease) -> None:
        """Take a slot, into which prefill puts all tokens so far."""
        self.lease, self.goal = lease, self._count

    def park(self) -> None:
        self.parked_at = time.monotonic()
        if self.pending is not None:
            self.pending.rows = None  # computed again after the return

    def resume(self) -> None:
        assert self.parked_at is not None
        self.admitted_at += time.monotonic() - self.parked_at
        self.parked_at = None

    @property
    def slot_seconds(self) -> float:
        """Seconds since the job was admitted, without those for which it was parked."""
        return (time.monotonic() if self.parked_at is None else self.parked_at) - self.admitted_at

    def append(self, token: int) -> None:
        self.buffer[self._count] = token
        self._count += 1

    def overdue(self, now: float) -> bool:
        return self.request.deadline is not None and now >= self.request.deadline
