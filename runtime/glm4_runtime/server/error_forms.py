"""Chooses the form of an error: that of the API which the client speaks."""

from starlette.types import Scope

from glm4_runtime.server.anthropic import errors as anthropic
from glm4_runtime.server.errors import Json, api_error


def error_response(error: Exception, scope: Scope) -> Json:
    told = api_error(error)
    body = anthropic.error_body(told) if anthropic.is_asked(scope) else told.body
    return Json(body, told.status, told.headers)
