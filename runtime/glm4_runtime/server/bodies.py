"""The bodies of requests: read within limits of length, time and memory, and handed on in turn.

A small body is always read, so that a small request never waits for large ones. Large bodies share one budget.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Message, Receive

from glm4_runtime.server.engine import ClientGoneError
from glm4_runtime.server.errors import ApiError

# uvicorn buffers as much of each connection anyway.
SMALL = 64 * 2**10
# Bytes of all large bodies together.
_BUDGET = 64 * 2**20
# Where the budget is spent, a body that has been arriving for so long makes room for a new one.
_PATIENCE = 1.0
# So many requests wait for room, each for so long.
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
            longest: bytes of one body.
            timeout: seconds for a whole body.
            silence: seconds between two pieces of it.
            budget: bytes of all large bodies; raised to four of the longest.
        """
        self._longest, self._timeout, self._silence = longest, timeout, silence
        self._budget = max(budget, 4 * longest)
        self.held = 0
        self._waiting = 0
        self._arriving: dict[_Share, float] = {}  # when each large body began, the oldest first
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def reading(self, length: int | None, receive: Receive) -> AsyncIterator[bytes]:
        """The body of one request; its bytes count until the end of the block.

        Args:
            length: as the client declares it; None where the body comes in chunks.

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
        """The next message, if it comes before ``end`` and within the time that a client may be silent."""
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
        """End the body that has been arriving for longest, if it began before that time."""
        oldest = next(iter(self._arriving), None)
        if oldest is not None and self._arriving[oldest] < before:
            del self._arriving[oldest]
            oldest.timeout.reschedule(asyncio.get_running_loop().time())

    async def _take_turn(self) -> None:
        """Wait for one's turn to be parsed, which stops the event loop for as long as it takes.

        Between two large bodies the loop is left to others for as long as the one before took. The callback runs
        once this task waits for the first time, when its body has been parsed.
        """
        await self._turn.acquire()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._parsed, loop.time())

    def _parsed(self, began: float) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(loop.time() - began, self._turn.release)
