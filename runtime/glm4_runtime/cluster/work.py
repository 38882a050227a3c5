"""The inside of a replica: a session, its scheduler, and the events that wait for the next report. It knows no Ray."""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from glm4_runtime.cluster.order import Action, Order, ReplicaReport, request_of
from glm4_runtime.errors import Glm4Error, ModelError, RequestError
from glm4_runtime.scheduler import Event, Failed, Generated, Request, Scheduler, Ticket
from glm4_runtime.session import Session
from glm4_runtime.structured import GrammarCompiler, GrammarMask

if TYPE_CHECKING:
    from glm4_runtime.tracing import Traces

logger = logging.getLogger(__name__)

# Threads that compile grammars.
_PREPARING = 4
# Cancelled orders that have not arrived yet; the oldest are forgotten.
_MOST_EARLY = 10_000


@dataclass
class _Running:
    """An order from its arrival to its end.

    Attributes:
        id: of its request, for the log. ``trace``: headers of the request.
        ticket: None while its grammar is compiled. ``later``: the actions that wait for the ticket.
        tokens: how many were generated here, since ``began`` on the clock of ``time.monotonic()``.
    """

    id: str
    trace: Mapping[str, str]
    ticket: Ticket | None = None
    later: list[Action] = field(default_factory=list)
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)

    def end(self, outcome: str, traces: "Traces | None") -> None:
        """Write one line, which the id joins with the server's line of this request, and make a span."""
        if traces is not None:
            seen = {
                "glm4.request.id": self.id,
                "glm4.outcome": outcome,
                "gen_ai.usage.output_tokens": self.tokens,
            }
            traces.order(self.trace, self.began, seen)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        seconds = round(time.monotonic() - self.began, 4)
        line = {"time": now, "event": "order", "id": self.id, "outcome": outcome, "tokens": self.tokens}
        logger.info(json.dumps(line | {"seconds": seconds}))


class ReplicaWork:
    """Runs orders and collects their events. All methods may be called from any thread."""

    def __init__(
        self,
        session: Session,
        scheduler: Scheduler,
        ends: Sequence[int],
        traces: "Traces | None" = None,
    ) -> None:
        """``ends``: ids of the tokens that end a reply; grammars allow them. ``traces``: makes a span of each order."""
        assert session.tokenizer is not None
        self._scheduler, self._traces = scheduler, traces
        self._grammars = GrammarCompiler(session.tokenizer, session.manifest.model.vocab_size, ends)
        self._threads = ThreadPoolExecutor(_PREPARING, "replica-order")
        self._lock = threading.Condition()
        self._orders: dict[int, _Running] = {}
        self._early: dict[int, None] = {}
        self._events: list[tuple[int, Event]] = []
        scheduler.start()

    def submit(self, number: int, order: Order) -> None:
        """Run an order; returns at once. An error arrives as the event :class:`Failed`."""
        with self._lock:
            if number in self._early:
                del self._early[number]
                return
            self._orders[number] = _Running(order.request.id, order.request.trace)
        if order.grammar is None:
            self._begin(number, order)
        else:
            self._threads.submit(self._begin, number, order)

    def act(self, number: int, action: Action) -> None:
        """Change an order. Messages may overtake each other, so a cancelled order may arrive later."""
        with self._lock:
            running = self._orders.get(number)
            if action == "cancel":
                self._cancelled(number)
            if running is not None and running.ticket is None:
                running.later.append(action)
            ticket = None if running is None else running.ticket
        if ticket is not None:
            getattr(ticket, action)()

    def report(self, seconds: float) -> ReplicaReport:
        """Wait up to ``seconds`` for events, and return all that have come since the last report."""
        with self._lock:
            self._lock.wait_for(lambda: self._events, seconds)
            events, self._events = self._events, []
        return ReplicaReport(tuple(events), self._scheduler.stats(), self._scheduler.step_seconds)

    def close(self) -> None:
        self._scheduler.stop(0)
        self._threads.shutdown(cancel_futures=True)

    def _cancelled(self, number: int) -> None:
        if running := self._orders.pop(number, None):
            running.end("cancelled", self._traces)
        else:
            self._early[number] = None
            while len(self._early) > _MOST_EARLY:
                del self._early[next(iter(self._early))]

    def _begin(self, number: int, order: Order) -> None:
        try:
            request = request_of(order, self._grammars)
            ticket = self._scheduler.submit(request, self._receiver(number, request))
        except Glm4Error as error:
            self._put(number, Failed(error))
        except BaseException as error:  # a panic in an extension is no Exception
            logger.exception("an order could not be begun")
            self._put(number, Failed(ModelError(f"the request could not be begun ({type(error).__name__})")))
        else:
            self._begun(number, ticket)

    def _begun(self, number: int, ticket: Ticket) -> None:
        with self._lock:
            running = self._orders.get(number)
            if running is None:  # it was cancelled, or it has ended already
                later: list[Action] = ["cancel"]
            else:
                running.ticket, later = ticket, running.later
        for action in later:
            getattr(ticket, action)()

    def _receiver(self, number: int, request: Request) -> Callable[[Event], None]:
        def receive(event: Event) -> None:  # runs on the scheduler's thread
            failure = request.mask.failure if isinstance(request.mask, GrammarMask) else None
            if isinstance(event, Failed) and failure is not None:
                event = Failed(RequestError(failure))
            self._put(number, event, event.last or not request.generates)

        return receive

    def _put(self, number: int, event: Event, last: bool = True) -> None:
        with self._lock:
            running = self._orders.get(number)
            if running is None:
                return
            running.tokens += isinstance(event, Generated)
            if last:
                del self._orders[number]
                running.end(_outcome(event), self._traces)
            self._events.append((number, event))
            self._lock.notify_all()


def _outcome(event: Event) -> str:
    if isinstance(event, Generated):
        return event.token.finish_reason or ""
    return type(event.error).__name__ if isinstance(event, Failed) else "read"
