"""One request on its way: its tokens, its slot, what it waits for, and whom it tells."""

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
    """A request's return slip. Its listener hears of one end at most, and of nothing after it."""

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
        """Generate no more for now, from any thread; what one step has begun still comes.

        The request keeps its slot, and its deadline does not move.
        """
        self._held = True

    def go_on(self) -> None:
        """Generate again after :meth:`hold`, from any thread."""
        self._held = False
        self._wake()

    def cancel(self) -> None:
        """End the request, from any thread; no event comes after this returns, and its slot is free within one step.

        Does nothing to a request that has ended.
        """
        with self._lock:
            self._cancelled = self._closed = True
        self._wake()

    def tell(self, event: Event) -> None:
        """Deliver an event; a listener that fails has cancelled its request."""
        with self._lock:
            if self._closed:
                return
            self._closed = event.last
            try:
                self._on_event(event)
            except BaseException:  # whatever it is, it is the listener's own
                logger.exception("a listener failed; its request is cancelled")
                self._cancelled = self._closed = True


@dataclass
class Pending:
    """A token that is not told yet, because the mask after it may make it the last.

    Attributes:
        mask: ends when that mask has been worked out.
        logits: those of the next token, float32 [vocab], where the model has run ahead of the mask.
        runs_ahead: whether the model may do so; not again where that failed, as the token may be the last.
    """

    told: Generated
    mask: Future[None]
    logits: Logits | None = None
    runs_ahead: bool = True


class Job:
    """Prompt and output of one request.

    Attributes:
        scores: of the prompt, filled in as it is taken; None where they were not asked for.
        buffer: its tokens, and room for all that may follow, int64 [prompt + limit].
        lease: its slot, from the first token of its prompt to its end.
        pending: the last token, while the mask after it is being worked out.
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
        """Prompt and output so far; a view."""
        return self.buffer[: self._count]

    @property
    def prompt_ids(self) -> Ids:
        return self.buffer[: self.prompt]

    @property
    def reusable_ids(self) -> Ids:
        """The part of the prompt that may be taken from elsewhere: nothing, where every position is scored."""
        return self.prompt_ids if self.scores is None else self.prompt_ids[:0]

    @property
    def count(self) -> int:
        """How many tokens of output there are."""
        return self._count - self.prompt

    @property
    def last(self) -> int:
        return int(self.buffer[self._count - 1])

    @property
    def fed(self) -> int:
        """So many of its tokens are in its slot: all but the last one when it is ready to decode."""
        return 0 if self.lease is None else self.lease.fed

    @property
    def rest(self) -> int:
        """Tokens of the prompt that are still to be taken."""
        return max(0, self.prompt - self.fed)

    @property
    def decodes(self) -> bool:
        """Whether its next step is to feed the last token."""
        held_back = self.pending is not None and not self.pending.runs_ahead
        fed = self._count > self.prompt and self.fed == self._count - 1
        return fed and not held_back and not self.ticket.held

    @property
    def settles(self) -> bool:
        """Whether its mask is ready."""
        return self.pending is not None and self.pending.mask.done()

    @property
    def waits(self) -> bool:
        """Whether nothing can be done for it until its mask is ready, or its listener lets it go on."""
        return not (self.rest or self.decodes or self.settles)

    def append(self, token: int) -> None:
        self.buffer[self._count] = token
        self._count += 1

    def overdue(self, now: float) -> bool:
        return self.request.deadline is not None and now >= self.request.deadline
