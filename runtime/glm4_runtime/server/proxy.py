"""Support for a path prefix of a reverse proxy, and for web pages of other origins (CORS)."""

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Prefixed:
    """Accepts requests with and without a path prefix: some proxies pass the prefix on, others remove it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == self._prefix:  # the page uses routes relative to its own address
            await RedirectResponse(f"{self._prefix}/")(scope, receive, send)
            return
        if path.startswith(f"{self._prefix}/"):
            raw = scope["raw_path"]
            scope = {
                **scope,
                "path": path.removeprefix(self._prefix),
                "raw_path": raw.removeprefix(self._prefix.encode()),
            }
        await self._app(scope, receive, send)


def shared_with(origins: tuple[str, ...]) -> list[Middleware]:
    """The middleware that allows pages of these origins; empty if there are none."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),  # clients send data about themselves in their own headers
            expose_headers=("x-request-id", "request-id", "retry-after"),
            allow_private_network=True,  # allows a public page to use a server on the user's machine
        )
    ]
