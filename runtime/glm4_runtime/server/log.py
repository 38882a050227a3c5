"""One JSON object a line on stderr: every request, and every defect with its traceback.

What was asked and answered is left out unless the server was told to keep it, also where an error quotes it.
"""

import contextvars
import json
import logging
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from glm4_runtime.server.errors import ApiError

_LEVELS = logging.getLevelNamesMapping()


@dataclass
class _Settings:
    level: int = logging.INFO
    words: bool = False


_settings = _Settings()  # one process, one log
_record: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("glm4_request", default=None)


def begin(request_id: str) -> dict[str, Any]:
    """The record of a new request; :func:`record` finds it from whatever runs for it."""
    fields: dict[str, Any] = {"id": request_id}
    _record.set(fields)
    return fields


def record() -> dict[str, Any]:
    """The record of the request that is being answered, to be added to."""
    fields = _record.get()
    return {} if fields is None else fields


def configure(level: str, words: bool) -> None:
    """
    Args:
        level: the least important lines that are written: debug, info or warning.
        words: whether errors are written as the client sees them, who may be quoted in them.
    """
    _settings.level, _settings.words = _LEVELS[level.upper()], words


def write(event: str, level: str = "info", **fields: Any) -> None:
    if _LEVELS[level.upper()] < _settings.level:
        return
    now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "level": level, "event": event} | fields, default=str)
    print(line, file=sys.stderr, flush=True)


def refusal(told: ApiError, error: BaseException) -> None:
    """Why a request was not served."""
    fields = record()
    fields["error"] = str(told) if _settings.words else told.without_quotes
    if told.param is not None:
        fields["param"] = told.param
    if told.status == 500:
        defect(error)


def defect(error: BaseException) -> None:
    """An error that is ours, for whoever runs the server; the client is told nothing of it."""
    text = "".join(traceback.format_exception(error))
    write("defect", "error", id=record().get("id"), error=f"{type(error).__name__}: {error}", traceback=text)


class Handler(logging.Handler):
    """What libraries and the scheduler log, in the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info is not None and record.exc_info[1] is not None:
            fields["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        write("log", record.levelname.lower(), **fields)
