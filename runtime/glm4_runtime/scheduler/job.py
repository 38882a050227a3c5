"""The state of one running request: its tokens, its slot, its pending token and its listener."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from glm4_runtime.generate import Continuation, Logits
from glm4_runtime.scheduler.api import Event, Generated, Request
from glm4_runtime.scheduler.prefix_cache import Ids
from glm4_runtime.scheduler.slots import Lease
from glm4_runtime.scoring import PromptScores

logger = logging.getLogger(__name__)


class Ticket:
    """The caller's handle on a request, and the request's way to its listener.

    The listener receives at most one last event, and no event afterwards.
    """

    def __init__(self, on_event: Callable[[Event], None], wake: Callable[[], None]) -> None:
        self._on_event, self._wake = on_event, wake
        self._lock = threading.RLock()  # reentrant: a listener may cancel from within an event
        self._cancelled = self._closed = self._held = False

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
        mask: done when the mask is computed.
        logits: logits of the next token, float32 [vocab], if the model ran before the mask was ready.
        runs_ahead: whether the model may run before the mask is ready. False after such a run failed.
    """

    told: Generated
    mask: Future[None]
    logits: Logits | None = None
    runs_ahead: bool = True


class Job:
    """Prompt and output of one request.

    Attributes:
        prompt: number of tokens of the prompt.
        scores: log-probabilities of the prompt, filled during prefill. None: the request does not ask for them.
        buffer: tokens of prompt and output, int64 [prompt + limit].
        lease: the slot, from the start of prefill to the end of the job.
        pending: the last token, while the mask after it is being computed.
    """

    def __init__(self, request: Request, continuation: Continuation, ticket: Ticket) -> None:
        self.request, self.continuation, self.ticket = request, continuation, ticket
        self.prompt = len(request.prompt_ids)
        self.buffer = np.empty(self.prompt + continuation.limit, np.int64)
        self.buffer[: self.prompt] = request.prompt_ids
        self._count = self.prompt
        self.scores = (
            None
            if request.prompt_logprobs is None
            else PromptScores(request.prompt_ids, request.prompt_logprobs)
        )
        self.lease: Lease | None = None
        self.pending: Pending | None = None
        self.admitted_at = time.monotonic()

    @property
    def ids(self) -> Ids:
        """Tokens of the prompt and of the output so far; a view of ``buffer``."""
        return self.buffer[: self._count]

    @property
    def prompt_ids(self) -> Ids:
        return self.buffer[: self.prompt]

    @property
    def reusable_ids(self) -> Ids:
        """The part of the prompt that may come from the prefix cache. Empty if the prompt is scored, because scores
        need the logits of every position."""
        return self.prompt_ids if self.scores is None else self.prompt_ids[:0]

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
        """Number of prompt tokens that are not in the slot yet."""
        return max(0, self.prompt - self.fed)

    @property
    def decodes(self) -> bool:
        """Whether the job takes part in the next decode step."""
        held_back = self.pending is not None and not self.pending.runs_ahead
        fed = self._count > self.prompt and self.fed == self._count - 1
        return fed and not held_back and not self.ticket.held

    @property
    def settles(self) -> bool:
        """Whether a token is pending and its mask is ready."""
        return self.pending is not None and self.pending.mask.done()

    @property
    def waits(self) -> bool:
        """Whether the job can do nothing until its mask is ready or :meth:`Ticket.go_on` is called."""
        return not (self.rest or self.decodes or self.settles)

    def append(self, token: int) -> None:
        self.buffer[self._count] = token
        self._count += 1

    def overdue(self, now: float) -> bool:
        return self.request.deadline is not None and now >= self.request.deadline
