"""One request on its way over replicas. It remembers the tokens that its client has, and goes on from there."""

import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace

from glm4_runtime.cluster.order import Action, Order, order_of
from glm4_runtime.errors import Glm4Error, ReplicaError
from glm4_runtime.scheduler import Event, Failed, Generated, Request, Started

logger = logging.getLogger(__name__)

# After so many deaths in a row, without a new token between them, a request runs alone on its next replica.
ALONE_AFTER = 2
# A request changes its replica at most so often.
MOST_MOVES = 16


class Migration:
    """A request, its listener, and its progress; the caller's handle, too.

    The sampler's random numbers depend on the seed and the position. So a request without a seed gets one here, and
    each replica continues with the numbers of the first.

    Attributes:
        number: the number of its order on its current replica. None: it waits.
        replica: the name of its current replica.
        moves: how many replicas it has lost.
        since: how many reports the current replica had given when the request came to it, or began there.
    """

    def __init__(
        self,
        request: Request,
        on_event: Callable[[Event], None],
        act: Callable[["Migration", Action], None],
    ) -> None:
        if request.params.seed is None:
            request = replace(request, params=replace(request.params, seed=secrets.randbits(63)))
        self.request = request
        self.number: int | None = None
        self.replica: str | None = None
        self.since = 0
        self._on_event, self._act = on_event, act
        self._lock = threading.RLock()  # reentrant: a listener may cancel from within an event
        self._tokens: list[int] = []
        self._started = self._closed = self._held = self._lagging = False
        self._strikes = self.moves = self._tokens_at_begin = 0

    # The handle -----------------------------------------------------------------------------------

    @property
    def held(self) -> bool:
        return self._held

    @property
    def lagging(self) -> bool:
        return self._lagging

    def hold(self) -> None:
        self._held = True
        self._act(self, "hold")

    def go_on(self) -> None:
        self._held = False
        self._act(self, "go_on")

    def lag(self) -> None:
        if not self._lagging:
            self._lagging = True
            self._act(self, "lag")

    def catch_up(self) -> None:
        self._lagging = False
        self._act(self, "catch_up")

    def cancel(self) -> None:
        with self._lock:
            self._closed = True
        self._act(self, "cancel")

    # Progress -------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the request has ended or was cancelled."""
        return self._closed

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens of the prompt, and those that the client has."""
        return (*self.request.prompt_ids, *self._tokens)

    @property
    def generated(self) -> int:
        """The number of tokens that the client has."""
        return len(self._tokens)

    @property
    def suspect(self) -> bool:
        """Whether its last replica died, and no token has come since."""
        return self._strikes > 0 and (self.number is None or len(self._tokens) == self._tokens_at_begin)

    @property
    def lone(self) -> bool:
        """Whether it is a suspect that must run alone, so that a further death shows whether it is the cause."""
        return self.suspect and self._strikes >= ALONE_AFTER

    def begin(self, replica: str, number: int) -> Order:
        """Go to a replica; returns the order for it."""
        self.replica, self.number = replica, number
        self._tokens_at_begin = len(self._tokens)
        return order_of(self.request, tuple(self._tokens), self._started)

    def take(self, number: int, event: Event) -> bool:
        """Pass an event to the listener. Returns whether the request has ended.

        Events of an earlier replica and a second :class:`Started` are dropped.
        """
        with self._lock:
            if self._closed or number != self.number:
                return self._closed
            if isinstance(event, Generated):
                self._tokens.append(event.token.id)
            if isinstance(event, Started):
                if self._started:
                    return False
                self._started = True
            self._closed = event.last or (isinstance(event, Started) and not self.request.generates)
            self._tell(event)
            return self._closed

    def fail(self, error: Glm4Error) -> None:
        """End the request with an error, if it has not ended."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._tell(Failed(error))

    def pause(self) -> None:
        """Leave a replica that is alive. The order there is no longer listened to."""
        if not self.suspect:
            self._strikes = 0
        self.number = self.replica = None

    def leave(self, reason: str, alone: bool) -> ReplicaError | None:
        """Leave a replica that died. Returns the error if the request may not go to another one.

        A death without a new token of this request is a strike. After a new token the count begins again, so that a
        long request survives the deaths of others. The second strike decides only if the request was ``alone``.

        Args:
            alone: whether the replica ran no other request, and was alive after this one had begun.
        """
        new = len(self._tokens) > self._tokens_at_begin
        self._strikes = 1 if new else self._strikes + 1
        self.moves += 1
        self.number = self.replica = None
        if self._strikes > ALONE_AFTER or (self._strikes == ALONE_AFTER and alone):
            return ReplicaError(
                f"{self._strikes} replicas died while they ran this request, so it is given up: {reason}"
            )
        if self.moves >= MOST_MOVES:
            return ReplicaError(f"this request lost its replica {self.moves} times and is given up: {reason}")
        return None

    def _tell(self, event: Event) -> None:
        try:
            self._on_event(event)
        except BaseException:  # the listener's error must not end the thread of a replica
            logger.exception("a listener failed; its request is cancelled")
            self.cancel()
