"""Checks before a route: the log record, the host name, the API key, and a bounded body.

Plain ASGI, so that streams and disconnects reach the routes unchanged.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm4_runtime.server import lanes, log, sharing
from glm4_runtime.server.bodies import Bodies
from glm4_runtime.server.error_forms import error_response
from glm4_runtime.server.errors import ApiError
from glm4_runtime.server.running_replies import ClientGoneError
from glm4_runtime.server.served_model import ServedModel

if TYPE_CHECKING:
    from glm4_runtime.tracing import RequestTrace, Traces

# The page asks the user for the key. Health probes have no key.
_OPEN = frozenset({"/", "/health", "/health/live", "/health/ready"})
# Paths that monitoring requests every few seconds.
_PROBES = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
_KEY = "glm4.api_key"
_TRACE = "glm4.trace"
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Recorded:
    """Writes one log line and one count for each request, and catches all remaining errors."""

    def __init__(
        self, app: ASGIApp, served: ServedModel, routes: Collection[str], traces: "Traces | None"
    ) -> None:
        self._app, self._served, self._routes = app, served, frozenset(routes)
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _PLAIN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        fields = log.begin(request_id)
        status, began = 0, time.perf_counter()
        if self._traces is not None and scope["path"] not in _PROBES:
            scope[_TRACE] = self._traces.begin(scope)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id  # OpenAI's name, and Anthropic's
                if self._served.draining:
                    headers["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except ClientGoneError:
            status = status or 499
        except Exception as error:
            log.defect(error)
            if not status:
                await error_response(error, scope)(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - began
            path = self._route(scope)
            self._served.metrics.requests.labels(path, str(status or 499)).inc()
            if path.startswith("/v1/") and scope["method"] == "POST":
                self._served.metrics.request_seconds.observe(seconds)
            if (trace := trace_of(scope)) is not None:
                trace.end(path, status or 499, self._served.name, fields)
            method, shown = scope["method"], scope["path"][:200]
            log.write(
                "request",
                "debug" if scope["path"] in _PROBES and status < 500 else "info",
                **log.shown(fields)
                | {"method": method, "path": shown, "status": status or 499, "seconds": round(seconds, 4)},
            )

    def _route(self, scope: Scope) -> str:
        """The route's path for the metrics, with the names of its parameters instead of their values."""
        if scope["path"] in self._routes:
            return str(scope["path"])
        return getattr(scope.get("route"), "path", "other")


class Guarded:
    """Refuses requests with a wrong host name, without a valid key, or with a body that is too large."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Collection[str],
        host_names: Collection[str] | None,
        bodies: Bodies,
    ) -> None:
        self._app, self._bodies = app, bodies
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._host_names = host_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._require_host(headers)
            if scope["path"] not in _OPEN:
                scope[_KEY] = self._require_key(headers)
                sharing.note_key(scope[_KEY])
            async with self._bodies.reading(_declared_length(headers), receive) as body:
                lanes.note_body(len(body))
                await self._app(scope, _replayed(body, receive), send)
        except ApiError as error:
            log.refusal(error, error)
            await error_response(error, scope)(scope, receive, send)

    def _require_host(self, headers: Headers) -> None:
        """Check the host name. A foreign web page can let its own name point to this machine; the browser then sends
        that name."""
        if self._host_names is None:
            return
        name = re.sub(r":\d*$", "", headers.get("host", "").lower())
        if name not in self._host_names:
            known = ", ".join(sorted(self._host_names))
            raise ApiError(421, f"this server is not {name[:100]!r}; it answers to {known}")

    def _require_key(self, headers: Headers) -> bytes:
        """The digest of the request's key; empty if the server has no keys."""
        if not self._digests:
            return b""
        # compare every key, each in constant time, so that the time reveals nothing
        given = _given_keys(headers)
        matches = [key for key in given for digest in self._digests if hmac.compare_digest(key, digest)]
        if not matches:
            raise ApiError(
                401, "a valid API key is needed: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            )
        return matches[0]


def key_of(scope: Scope) -> bytes:
    """The digest of the API key of a request that passed; empty if the server has no keys."""
    return bytes(scope.get(_KEY, b""))


def trace_of(scope: Scope) -> "RequestTrace | None":
    """The trace of a request. None: traces are off."""
    found: RequestTrace | None = scope.get(_TRACE)
    return found


def _given_keys(headers: Headers) -> list[bytes]:
    """The digests of the keys in a request's headers: OpenAI's clients send one, and Anthropic's the other."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    given = [key if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    return [
        _digest(key.strip().encode("latin-1")) for key in given if key
    ]  # a header is bytes, one a character


def _declared_length(headers: Headers) -> int | None:
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then the messages after it (the disconnect)."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
