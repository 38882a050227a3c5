"""The running sequences of one HTTP request: their events, in the event loop."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

from glm4_runtime.backend import Backend, Handle
from glm4_runtime.errors import Glm4Error, RequestError
from glm4_runtime.scheduler import Event, Failed, Generated, Request, Started
from glm4_runtime.server.metrics import Metrics
from glm4_runtime.server.sequence_times import SequenceTimes
from glm4_runtime.server.unread import UnreadOfOne
from glm4_runtime.structured import GrammarMask


class ClientGoneError(Exception):
    """The client closed the connection before the answer was ready."""


class RunningReplies:
    """The running sequences of one HTTP request.

    Attributes:
        began: ``time.perf_counter()`` at the submission. ``times``: the moments of each sequence.
    """

    def __init__(
        self,
        scheduler: Backend,
        requests: Sequence[Request],
        metrics: Metrics,
        unread: UnreadOfOne,
    ) -> None:
        self.began = time.perf_counter()
        self._requests, self._metrics = requests, metrics
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self.times = [SequenceTimes(self.began) for _ in requests]
        self._open = set(range(len(requests)))
        self._tickets: list[Handle] = []
        self._unread = unread
        try:
            for index, request in enumerate(requests):
                self._tickets.append(scheduler.submit(request, self._receiver(index)))
        except BaseException:
            self.close()
            raise

    async def events(self) -> AsyncIterator[tuple[int, Started | Generated]]:
        """Yield (index of the sequence, event) until all sequences have ended.

        Raises:
            ClientGoneError: the job was abandoned.
            Glm4Error: the error of the first sequence that fails. The other sequences are cancelled.
        """
        while self._open:
            entry = await self._events.get()
            if entry is None:
                raise ClientGoneError
            index, event = entry
            self._unread.take(event, self._tickets)
            if index not in self._open:
                continue
            if isinstance(event, Failed):
                self.cancel()
                raise self._cause(index, event.error)
            if isinstance(event, Generated):
                self._measure(index, event)
                if event.token.finish_reason is not None:
                    self._open.discard(index)
            else:
                self.times[index].begin(event, time.perf_counter())
                if not self._requests[index].generates:
                    self._open.discard(index)
            yield index, event

    @property
    def first_token(self) -> float | None:
        """``time.perf_counter()`` at the first token of all sequences. None: there is none yet."""
        return min((one.first for one in self.times if one.first is not None), default=None)

    @property
    def last_token(self) -> float:
        """``time.perf_counter()`` at the last token, or ``began`` before the first token."""
        return max(one.last for one in self.times)

    def end(self, index: int) -> None:
        """Cancel one sequence and ignore its further events."""
        self._open.discard(index)
        self._tickets[index].cancel()

    def cancel(self) -> None:
        """Cancel all sequences; their slots become free."""
        for ticket in self._tickets:
            ticket.cancel()

    def close(self) -> None:
        """Cancel, and remove unread events from the count of unread tokens."""
        self.cancel()
        self._unread.close(self._tickets)

    def abandon(self) -> None:
        """Cancel, and make :meth:`events` raise :class:`ClientGoneError`."""
        self.cancel()
        self._events.put_nowait(None)

    def _cause(self, index: int, error: Glm4Error) -> Glm4Error:
        """The error to report. If the grammar became too expensive, the request is at fault and not the model."""
        mask = self._requests[index].mask
        failure = mask.failure if isinstance(mask, GrammarMask) else None
        return error if failure is None else RequestError(failure)

    def _receiver(self, index: int) -> Callable[[Event], None]:
        def receive(event: Event) -> None:  # runs on the scheduler's thread
            self._unread.put(event, self._tickets[index] if index < len(self._tickets) else None)
            with contextlib.suppress(RuntimeError):  # the event loop is closed, so no reader is left
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return receive

    def _measure(self, index: int, event: Generated) -> None:
        times = self.times[index]
        histogram = (
            self._metrics.first_token_seconds if times.first is None else self._metrics.inter_token_seconds
        )
        histogram.observe(times.take(event, time.perf_counter()))
        if event.mask_seconds:
            self._metrics.mask_seconds.observe(event.mask_seconds)
