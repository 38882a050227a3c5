"""Limits the number of connections, and the time of each.

uvicorn ends a connection that is silent after an answer. This file handles the other cases: a client that sends no
request or half of one, a client that does not read its answer, and too many clients.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

# Maximum seconds for which a client may read nothing of an answer that is over.
_LINGER = 5.0
# Unsent bytes that the server, and the system, keep for a connection. More would hide for long that a client does not
# read: a token takes about 200 bytes.
_UNSENT = 16 * 1024
# Bytes of an answer that a client has to read within its time.
_PROGRESS = 4096
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


_STATE = "connection"


class Phase(Enum):
    """The phase of a connection."""

    IDLE = "idle"  # between two requests
    HEADER = "header"  # waiting for a request, or its header has begun
    BODY = "body"
    ANSWER = "answer"


@dataclass(frozen=True)
class ConnectionLimits:
    """
    Attributes:
        most: maximum number of connections. A new one then ends the one whose request has been incomplete for
            longest.
        header: maximum seconds until the header of a request is complete.
        request: maximum seconds from the header of a request to the end of its answer.
        answer: seconds after a complete request in which its answer is computed, at the most.
        send: maximum seconds for which a client may leave its answer unread. After ``answer`` seconds, only a few.
    """

    most: int
    header: float
    request: float
    answer: float
    send: float


class Connections:
    """All open connections. Runs on the event loop only.

    Attributes:
        ended: number of ended connections by reason: header, request, send, evicted, full.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._open: dict[Connection, None] = {}
        # connections without a complete request, the longest waiting first
        self._unfinished: dict[Connection, None] = {}
        self.ended = dict.fromkeys(("header", "request", "send", "evicted", "full"), 0)

    def __len__(self) -> int:
        return len(self._open)

    def protocol(self, **options: Any) -> "Connection":
        """Create a connection; called by uvicorn."""
        return Connection(self, **options)

    def opened(self, connection: "Connection") -> bool:
        """Admit a new connection; False if there is no room and no other can be ended."""
        if len(self._open) >= self._limits.most:
            if not self._unfinished:
                self.ended["full"] += 1
                return False
            self._end(next(iter(self._unfinished)), "evicted")
        self._open[connection] = self._unfinished[connection] = None
        return True

    def closed(self, connection: "Connection") -> None:
        self._open.pop(connection, None)
        self._unfinished.pop(connection, None)

    def changed(self, connection: "Connection") -> None:
        """Record a connection's new phase."""
        if connection.phase is Phase.ANSWER:
            self._unfinished.pop(connection, None)
        elif connection.phase is not Phase.BODY:
            self._unfinished.pop(connection, None)
            self._unfinished[connection] = None

    def sweep(self) -> None:
        """End the connections that have exceeded a limit."""
        now = time.monotonic()
        for connection in list(self._open):
            connection.note_progress(now)
            reason = self._overdue(connection, now)
            if reason is not None:
                self._end(connection, reason)

    def _overdue(self, connection: "Connection", now: float) -> str | None:
        limits = self._limits
        over = connection.transport.is_closing() or connection.answering_for(now) > limits.answer
        if connection.unread_for(now) > (_LINGER if over else limits.send):
            return "send"
        spent = now - connection.since
        if connection.phase is Phase.HEADER and spent > limits.header:
            return "header"
        return (
            "request" if connection.phase in (Phase.BODY, Phase.ANSWER) and spent > limits.request else None
        )

    def _end(self, connection: "Connection", reason: str) -> None:
        self.ended[reason] += 1
        self.closed(connection)
        connection.transport.abort()


class Connection(H11Protocol):
    """uvicorn's connection, with its phase.

    Attributes:
        phase: see :class:`Phase`.
        since: ``time.monotonic()`` at the start of the current request.
    """

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._connections = connections
        self.app_state = {**self.app_state, _STATE: self}  # the "state" of each request's scope
        self.phase = Phase.HEADER
        self.since = time.monotonic()
        self._unread_since: float | None = None
        self._unsent = 0  # bytes at the last progress
        self._answering_since: float | None = None

    @property
    def blocked(self) -> bool:
        """Whether the client has to read before more can be sent; callable from any thread."""
        return self._unread_since is not None

    def answering_for(self, now: float) -> float:
        """Seconds since the current request was complete."""
        return 0 if self._answering_since is None else now - self._answering_since

    def note_progress(self, now: float) -> None:
        """Look whether the client has read enough since the last call or the last progress. Long answers are written at
        once, so that :meth:`resume_writing` comes only at their end. The few last bytes never came to
        :meth:`pause_writing`."""
        unsent = self.transport.get_write_buffer_size()
        if self._unread_since is None and self.transport.is_closing():
            self._unread_since = now
        if self._unread_since is None or unsent > self._unsent:
            self._unsent = unsent
        elif unsent <= self._unsent - _PROGRESS:
            self._unsent, self._unread_since = unsent, now

    def unread_for(self, now: float) -> float:
        """Seconds since the client last read enough of its answer."""
        return 0 if self._unread_since is None else now - self._unread_since

    # Called by uvicorn and the transport --------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _keep_few_unsent(transport)
        if not self._connections.opened(self):
            transport.write(_FULL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.phase is Phase.IDLE:
            self._enter(Phase.HEADER)
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        self._enter(Phase.IDLE)
        super().on_response_complete()  # which starts the next request, if it has arrived
        self._look()

    def pause_writing(self) -> None:
        self._unread_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unread_since = None
        super().resume_writing()

    def _look(self) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._enter(Phase.BODY if cycle.more_body else Phase.ANSWER)
        elif self.conn.trailing_data[0]:  # the next header arrived with this request, and is incomplete
            self._enter(Phase.HEADER)

    def _enter(self, phase: Phase) -> None:
        if phase is self.phase:
            return
        if phase in (Phase.HEADER, Phase.IDLE) or self.phase is Phase.IDLE:
            self.since = time.monotonic()
        self.phase = phase
        self._answering_since = time.monotonic() if phase is Phase.ANSWER else None
        self._connections.changed(self)


def is_blocked(scope: Scope) -> Callable[[], bool]:
    """A function that says whether the connection of a request is full. Always False without a :class:`Connection`."""
    connection = scope.get("state", {}).get(_STATE)
    return (lambda: connection.blocked) if isinstance(connection, Connection) else (lambda: False)


def _keep_few_unsent(transport: asyncio.Transport) -> None:
    transport.set_write_buffer_limits(high=_UNSENT)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # Linux and macOS
        with contextlib.suppress(OSError):  # a socket of another family
            transport.get_extra_info("socket").setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT
            )
