"""Tokens that clients have not read yet: how many may wait, for one request and for all together."""

import threading

from glm4_runtime.scheduler import Event, Generated, Ticket

# Tokens of all requests, each of ``top_logprobs`` counted: some 100 MB.
_MOST = 2**18
# A request with fewer is never held.
_FEW = 2048


class Unread:
    """What waits for all clients. Where it is too much, requests with much of it generate no more for now.

    Events are put on the scheduler's thread, and taken on the event loop.
    """

    def __init__(self, most: int = _MOST, few: int = _FEW) -> None:
        self.most, self.few = most, few
        self.put = self.taken = 0  # each has one writer
        self._held: set[Ticket] = set()
        self._lock = threading.Lock()

    @property
    def too_many(self) -> bool:
        return self.put - self.taken > self.most

    def hold(self, ticket: Ticket) -> None:
        """Hold a request until its client, or others, have read enough."""
        with self._lock:
            self._held.add(ticket)
            ticket.hold()

    def let_go(self, ticket: Ticket) -> None:
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
    """What an unread event counts: one for the token, and one for each likeliest token beside it."""
    return 1 + len(event.top) if isinstance(event, Generated) else 1


class UnreadOfOne:
    """What waits for one client."""

    def __init__(self, everyone: Unread) -> None:
        self._everyone = everyone
        self._put = self._taken = 0
        self._closed = False

    def put(self, event: Event, ticket: Ticket | None) -> None:
        """Count an event before it is handed on, so that whoever takes the event finds its request held."""
        count = size(event)
        self._put += count
        self._everyone.put += count
        if ticket is not None and self._everyone.too_many and self._put - self._taken > self._everyone.few:
            self._everyone.hold(ticket)

    def take(self, event: Event, tickets: list[Ticket]) -> None:
        count = size(event)
        self._taken += count
        self._everyone.take(count)
        if self._put - self._taken <= self._everyone.few / 2:
            for ticket in tickets:
                if ticket.held:
                    self._everyone.let_go(ticket)

    def close(self, tickets: list[Ticket]) -> None:
        """Forget what nobody will read. The request is over, and nothing is put any more."""
        if not self._closed:
            self._closed = True
            for ticket in tickets:
                self._everyone.let_go(ticket)
            self._everyone.take(self._put - self._taken)
