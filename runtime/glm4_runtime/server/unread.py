"""Counts generated tokens that clients have not read.

A request whose client does not read may lose its slot to a waiting request. If all clients together leave too much
unread, requests are paused.
"""

import threading
from collections.abc import Callable

from glm4_runtime.backend import Handle
from glm4_runtime.scheduler import Event, Generated

# Most unread tokens of all requests; each entry of ``top_logprobs`` counts as a token. About 100 MB.
_MOST = 2**18
# A request with fewer unread tokens is never paused.
_FEW = 2048
# A client with more unread tokens lags, if its connection is full too.
_LAG = 32


class Unread:
    """Unread tokens of all clients. Above ``most``, requests with more than ``few`` unread tokens are paused.

    The scheduler's thread adds to ``put``; the event loop adds to ``taken``.
    """

    def __init__(self, most: int = _MOST, few: int = _FEW) -> None:
        self.most, self.few = most, few
        self.put = self.taken = 0  # only one thread writes each counter
        self._held: set[Handle] = set()
        self._lock = threading.Lock()

    @property
    def too_many(self) -> bool:
        return self.put - self.taken > self.most

    def hold(self, ticket: Handle) -> None:
        """Pause a request until its own client, or the other clients, have read enough."""
        with self._lock:
            self._held.add(ticket)
            ticket.hold()

    def let_go(self, ticket: Handle) -> None:
        with self._lock:
            if ticket in self._held:
                self._held.remove(ticket)
                ticket.go_on()

    def take(self, count: int) -> None:
        self.taken += count
        if self._held and self.put - self.taken <= self.most / 2:
            for ticket in tuple(self._held):
                self.let_go(ticket)


def size(event: Event) -> int:
    """The tokens that an event counts for: its token and each entry of its ``top_logprobs``."""
    return 1 + len(event.top) if isinstance(event, Generated) else 1


class UnreadOfOne:
    """Unread tokens of one HTTP request."""

    def __init__(self, everyone: Unread, blocked: Callable[[], bool]) -> None:
        """
        Args:
            blocked: whether the client's connection is full; called on the scheduler's thread.
        """
        self._everyone, self._blocked = everyone, blocked
        self._put = self._taken = 0
        self._closed = False

    def put(self, event: Event, ticket: Handle | None) -> None:
        """Count an event. Must run before the event is queued, so that the reader sees the pause and can end it."""
        count = size(event)
        self._put += count
        self._everyone.put += count
        unread = self._put - self._taken
        if ticket is None:
            return
        if unread > _LAG and self._blocked():
            ticket.lag()
        if self._everyone.too_many and unread > self._everyone.few:
            self._everyone.hold(ticket)

    def take(self, event: Event, tickets: list[Handle]) -> None:
        count = size(event)
        self._taken += count
        self._everyone.take(count)
        unread = self._put - self._taken
        for ticket in tickets:
            if ticket.lagging and unread <= _LAG / 2:
                ticket.catch_up()
            if ticket.held and unread <= self._everyone.few / 2:
                self._everyone.let_go(ticket)

    def close(self, tickets: list[Handle]) -> None:
        """Remove this request's unread tokens from the total. Requires that :meth:`put` is not called any more."""
        if not self._closed:
            self._closed = True
            for ticket in tickets:
                self._everyone.let_go(ticket)
            self._everyone.take(self._put - self._taken)
