"""Errors in the form of Anthropic's API."""

from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from glm4_runtime.server import log
from glm4_runtime.server.errors import ApiError

PATH = "/v1/messages"
# status -> type; other statuses are invalid requests
_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def is_asked(scope: Scope) -> bool:
    """Whether the client speaks Anthropic's API."""
    return scope["path"].startswith(PATH) or "anthropic-version" in Headers(scope=scope)


def error_body(error: ApiError) -> dict[str, Any]:
    told = {"type": _KINDS.get(error.status, "invalid_request_error"), "message": str(error)}
    return {"type": "error", "error": told, "request_id": log.record().get("id")}
