"""The ASGI application in front of all others: it can be changed while requests run."""

import threading

from starlette.types import ASGIApp, Receive, Scope, Send


class Front:
    """Passes each request to the current application. A request stays with the application that took it."""

    def __init__(self, app: ASGIApp) -> None:
        self._current = _Counted(app)
        self._lock = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan of the first application is that of the server
            await self._current.app(scope, receive, send)
            return
        with self._lock:
            counted = self._current
            counted.running += 1
        try:
            await counted.app(scope, receive, send)
        finally:
            with self._lock:
                counted.running -= 1
                counted.settle(counted is self._current)

    def change(self, app: ASGIApp) -> threading.Event:
        """Take another application. Returns the event of the end of all requests of the old one."""
        with self._lock:
            old, self._current = self._current, _Counted(app)
            old.settle(False)
        return old.ended


class _Counted:
    """
    Attributes:
        running: requests that the application has now.
        ended: set when the application has no request and gets no more.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.running, self.ended = app, 0, threading.Event()

    def settle(self, current: bool) -> None:
        if not current and not self.running:
            self.ended.set()
