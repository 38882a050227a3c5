"""One request on its way: its tokens, its slot, what it waits for, and whom it tells."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from glm4_runtime.generate import Continuation, Logits
from glm4_runtime.scheduler.api import Event, Generated, Request
from glm4_runtime.scoring import PromptScores

logger = logging.getLogger(__name__)


class Ticket:
    """A request's return slip."""

    def __init__(self, on_event: Callable[[Event], None], wake: Callable[[], None]) -> None:
        self._on_event, self._wake = on_event, wake
        self._lock = threading.RLock()  # reentrant: a listener may cancel from within an event
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """End the request, from any thread; no event comes after this returns, and its slot is free within one step.

        Does nothing to a request that has ended.
        """
        with self._lock:
            self._cancelled = True
        self._wake()

    def tell(self, event: Event) -> None:
        """Deliver an event; a listener that fails has cancelled its request."""
        with self._lock:
            if self._cancelled:
                return
            try:
                self._on_event(event)
            except Exception:
                logger.exception("a listener failed; its request is cancelled")
                self._cancelled = True


class Job:
    """Prompt and output of one request.

    Attributes:
        scores: of the prompt, filled in as it is taken; None where they were not asked for.
        slot: where its KV is; None until its prompt is begun.
        fed: so many of its tokens are in the slot. One less than there are when it is ready to decode.
        held: a token that is not told yet, as its mask may make it the last; ``masking`` works that out.
        logits: those of the next token, while the mask for it is being worked out.
    """

    def __init__(self, request: Request, continuation: Continuation, ticket: Ticket) -> None:
        self.request, self.continuation, self.ticket = request, continuation, ticket
        self.prompt = len(request.prompt_ids)
        self._ids = np.empty(self.prompt + continuation.limit, np.int64)
        self._ids[: self.prompt] = request.prompt_ids
        self._count = self.prompt
        self.scores = (
            None
            if request.prompt_logprobs is None
            else PromptScores(request.prompt_ids, request.prompt_logprobs)
        )
        self.slot: int | None = None
        self.fed = 0
        self.cached = 0
        self.held: Generated | None = None
        self.masking: Future[None] | None = None
        self.logits: Logits | None = None
        self.ended = False
        self.admitted_at = time.monotonic()

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Prompt and output so far; a view."""
        return self._ids[: self._count]

    @property
    def prompt_ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: self.prompt]

    @property
    def reusable_ids(self) -> npt.NDArray[np.int64]:
        """The part of the prompt that may be taken from elsewhere: nothing, where every position is scored."""
        return self.prompt_ids if self.scores is None else self.prompt_ids[:0]

    @property
    def count(self) -> int:
        """How many tokens of output there are."""
        return self._count - self.prompt

    @property
    def last(self) -> int:
        return int(self._ids[self._count - 1])

    @property
    def rest(self) -> int:
        """Tokens of the prompt that are still to be taken."""
        return max(0, self.prompt - self.fed)

    @property
    def decodes(self) -> bool:
        """Whether its next step is to feed the last token."""
        return self.fed == self._count - 1 and self._count > self.prompt

    def append(self, token: int) -> None:
        self._ids[self._count] = token
        self._count += 1

    def overdue(self, now: float) -> bool:
        return self.request.deadline is not None and now >= self.request.deadline
