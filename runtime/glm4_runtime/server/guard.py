"""What every request passes before a route sees it: a record, the server's name, a key, and a bounded body.

Plain ASGI, so that streams and disconnects reach the routes as they are.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4_runtime.server import log
from glm4_runtime.server.engine import ClientGoneError
from glm4_runtime.server.errors import ApiError, error_response
from glm4_runtime.server.metrics import Metrics

# The page asks for the key itself, and whoever watches over the process has none.
_OPEN = frozenset({"/", "/health", "/health/live", "/health/ready"})
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Recorded:
    """One line of the log and one count for each request; the last place that an error can reach."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Collection[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _PLAIN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        fields = log.begin(request_id)
        status, began = 0, time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except ClientGoneError:
            status = status or 499
        except Exception as error:
            log.defect(error)
            if not status:
                await error_response(error)(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - began
            path = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.requests.labels(path, str(status or 499)).inc()
            if path.startswith("/v1/") and scope["method"] == "POST":
                self._metrics.request_seconds.observe(seconds)
            method, shown = scope["method"], scope["path"][:200]
            log.write(
                "request",
                **fields
                | {"method": method, "path": shown, "status": status or 499, "seconds": round(seconds, 4)},
            )


class Guarded:
    """Turns away what calls this server by another name, has no key, or sends more than it may."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Collection[str],
        host_names: Collection[str] | None,
        max_body_bytes: int,
        body_timeout: float,
    ) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._host_names = host_names
        self._max_body_bytes, self._body_timeout = max_body_bytes, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._require_host(headers)
            if scope["path"] not in _OPEN:
                self._require_key(headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            log.refusal(error, error)
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, _replayed(body, receive), send)

    def _require_host(self, headers: Headers) -> None:
        """A web page elsewhere can have its own name point to this machine: then the browser sends that name."""
        if self._host_names is None:
            return
        name = re.sub(r":\d*$", "", headers.get("host", "").lower())
        if name not in self._host_names:
            known = ", ".join(sorted(self._host_names))
            raise ApiError(421, f"this server is not {name[:100]!r}; it answers to {known}")

    def _require_key(self, headers: Headers) -> None:
        if not self._digests:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # a header is bytes, shown one by one
        # every key is compared, each in constant time: how long it takes says nothing about them
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(401, "a valid API key is needed: send it as 'Authorization: Bearer KEY'")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        too_long = ApiError(
            413, f"the body is longer than the {self._max_body_bytes} bytes this server takes"
        )
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_timeout):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._max_body_bytes:
                        raise too_long
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {self._body_timeout:g} seconds") from error
        return bytes(body)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then whatever comes after it: the disconnect."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
