"""Reads the bodies of requests within limits of length, time and memory, and passes them on one by one.

A small body is always read, so that a small request never waits for large ones. Large bodies share one budget of
bytes.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Message, Receive

from glm4_runtime.server.errors import ApiError
from glm4_runtime.server.running_replies import ClientGoneError

# uvicorn buffers this much of each connection anyway.
SMALL = 64 * 2**10
# Maximum bytes of all large bodies together.
_BUDGET = 64 * 2**20
# If the budget is used up, a body that has been arriving for this many seconds gives way to a new one.
_PATIENCE = 1.0
# Maximum number of requests that wait for room, and their maximum seconds.
_MOST_WAITING, _LONGEST_WAIT = 64, 10.0
_POLL = 0.05


class _Share:
    """One body's part of the budget.

    Attributes:
        held: bytes of the budget; 0 for a small body.
        timeout: ends the reading.
    """

    def __init__(self, promised: int) -> None:
        self.promised, self.held = promised, 0
        self.timeout = asyncio.timeout(None)


class Bodies:
    """Reads the bodies of all requests. Runs on the event loop only.

    Attributes:
        held: bytes of the budget that are taken.
    """

    def __init__(self, longest: int, timeout: float, silence: float, budget: int = _BUDGET) -> None:
        """
        Args:
            longest: maximum bytes of one body.
            timeout: maximum seconds for a whole body.
            silence: maximum seconds between two pieces of it.
            budget: bytes of all large bodies; at least four times ``longest``.
        """
        self._longest, self._timeout, self._silence = longest, timeout, silence
        self._budget = max(budget, 4 * longest)
        self.held = 0
        self._waiting = 0
        self._arriving: dict[_Share, float] = {}  # start time of each large body, oldest first
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def reading(self, length: int | None, receive: Receive) -> AsyncIterator[bytes]:
        """The body of one request; its bytes count until the end of the block.

        Args:
            length: as the client declares it; None if the body comes in chunks.

        Raises:
            ApiError: 408 too slow, 413 too long, 503 no room. ClientGoneError: the client left.
        """
        self._require_length(length or 0)
        share = _Share(self._longest if length is None else length)
        try:
            body = await self._read(share, receive)
            if share.held:
                await self._take_turn()
            yield body
        finally:
            self.held -= share.held

    async def _read(self, share: _Share, receive: Receive) -> bytes:
        body, more = bytearray(), True
        share.timeout = asyncio.timeout(self._timeout)
        try:
            async with share.timeout:
                end = share.timeout.when() or 0.0
                while more:
                    message = await self._message(share.timeout, end, receive)
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    self._require_length(len(body))
                    if len(body) > SMALL and not share.held:
                        await self._take_room(share)
        except TimeoutError as error:
            raise ApiError(
                408,
                f"the body did not arrive in time: it may take {self._timeout:g} s, and each pause in it "
                f"{self._silence:g} s, less where many large bodies arrive at once",
            ) from error
        finally:
            self._arriving.pop(share, None)
        return bytes(body)

    async def _message(self, timeout: asyncio.Timeout, end: float, receive: Receive) -> Message:
        """The next message, if it arrives before ``end`` and within the allowed pause."""
        timeout.reschedule(min(end, asyncio.get_running_loop().time() + self._silence))
        message = await receive()
        timeout.reschedule(end)
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        return message

    def _require_length(self, length: int) -> None:
        if length > self._longest:
            raise ApiError(413, f"the body is longer than the {self._longest} bytes this server takes")

    async def _take_room(self, share: _Share) -> None:
        """Wait until the budget has room for the whole body. Large bodies that arrive slowly make room."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _LONGEST_WAIT
        self._waiting += 1
        try:
            while self.held + share.promised > self._budget:
                if self._waiting > _MOST_WAITING or loop.time() > end:
                    raise ApiError(
                        503, "too many large requests at once; try again", code="overloaded", retry_after=1
                    )
                self._end_the_slowest(loop.time() - _PATIENCE)
                await asyncio.sleep(_POLL)
        finally:
            self._waiting -= 1
        share.held = share.promised
        self.held += share.held
        self._arriving[share] = loop.time()

    def _end_the_slowest(self, before: float) -> None:
        """End the body that has been arriving for longest, if it began before ``before``."""
        oldest = next(iter(self._arriving), None)
        if oldest is not None and self._arriving[oldest] < before:
            del self._arriving[oldest]
            oldest.timeout.reschedule(asyncio.get_running_loop().time())

    async def _take_turn(self) -> None:
        """Wait for this body's turn to be parsed. Parsing blocks the event loop.

        Between two large bodies the loop is free for as long as the last parse took. The callback runs when this task
        waits for the first time: then its body has been parsed.
        """
        await self._turn.acquire()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._parsed, loop.time())

    def _parsed(self, began: float) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(loop.time() - began, self._turn.release)
