"""For a server that a reverse proxy shows under a path, and for web pages of other origins."""

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Prefixed:
    """Takes requests with and without a path prefix: some proxies hand it on, others strip it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == self._prefix:  # the page names its routes relative to its own address
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
    """What lets the pages of these origins use this server; nothing where there is none."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # clients send figures about themselves in headers of their own
            expose_headers=("x-request-id", "retry-after"),
            allow_private_network=True,  # a public page may then use a server on its user's machine
        )
    ]
