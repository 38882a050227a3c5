"""Errors in OpenAI's form: a status, and {"error": {message, type, param, code}}."""

import json
import re
from typing import Any

from starlette.responses import Response

from glm4_runtime.errors import (
    DeadlineError,
    Glm4Error,
    QueueFullError,
    ReplicaError,
    RequestError,
    StoppedError,
)

# status -> type and code
_KINDS = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "body_timeout"),
    409: ("conflict_error", "in_use"),
    413: ("invalid_request_error", "request_too_large"),
    421: ("invalid_request_error", "unknown_host"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "shutting_down"),
    504: ("timeout_error", "request_timeout"),
}

# Quoted text, as repr() and as JSON write it.
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*(?:'|$)|"(?:[^"\\]|\\.)*(?:"|$)""")


class ApiError(Glm4Error):
    """An error with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        foreign: bool = False,
    ) -> None:
        """``foreign``: the text after the first colon may come from a template or a grammar."""
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
        self._foreign = foreign

    @property
    def without_quotes(self) -> str:
        """The message without quotes of the request."""
        text = str(self).partition(": ")[0] if self._foreign else str(self)
        return _QUOTED.sub("'...'", text)[:300]

    @property
    def body(self) -> dict[str, Any]:
        kind, code = _KINDS[self.status]
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code or code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def api_error(error: Exception) -> ApiError:
    """The error that the client gets. A bug is reported without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), retry_after=error.retry_after)
    if isinstance(error, DeadlineError | TimeoutError):
        return ApiError(504, "the request took longer than this server allows")
    if isinstance(error, StoppedError):
        return ApiError(503, str(error))
    if isinstance(error, ReplicaError):
        return ApiError(503, str(error), code="no_replica", retry_after=1)
    if isinstance(error, RequestError):
        return ApiError(400, str(error), foreign=True)
    return ApiError(500, "the server failed on this request; its log says why")


class Json(Response):
    """JSON as UTF-8. Text that UTF-8 cannot encode (half a surrogate pair from a request) is escaped."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)

    @classmethod
    def encoded(cls, content: bytes) -> "Json":
        """A response with content that is JSON already."""
        return _Encoded(content)


class _Encoded(Json):
    def render(self, content: bytes) -> bytes:
        return content


def encode(content: Any) -> bytes:
    try:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(content, separators=(",", ":")).encode()
