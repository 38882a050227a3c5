"""The log: one JSON object per line on stderr, for every request, and for every bug with its traceback.

Prompts and answers are left out, also from quotes in errors, unless an option enables them. No request waits for
the reader of the log: lines that cannot be written in time are dropped and counted.
"""

import contextvars
import json
import logging
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from glm4_runtime.server.errors import ApiError
from glm4_runtime.server.log_writer import LogWriter

_TEXTS = {"prompts", "answers"}
_LEVELS = logging.getLevelNamesMapping()


@dataclass
class _Settings:
    level: int = logging.INFO
    words: bool = False


_settings = _Settings()  # one process, one log
_record: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("glm4_request", default=None)


def begin(request_id: str) -> dict[str, Any]:
    """Start the record of a new request. :func:`record` finds it in all code that runs for this request."""
    fields: dict[str, Any] = {"id": request_id}
    _record.set(fields)
    return fields


def record() -> dict[str, Any]:
    """The record of the current request; callers add to it."""
    fields = _record.get()
    return {} if fields is None else fields


def configure(level: str, words: bool) -> None:
    """
    Args:
        level: the lowest level that is written: debug, info or warning.
        words: whether to write errors as the client sees them, which may quote the client.
    """
    _settings.level, _settings.words = _LEVELS[level.upper()], words


def shown(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request without its texts, which may be there for traces alone, unless the log has them too."""
    return {name: value for name, value in fields.items() if _settings.words or name not in _TEXTS}


def write(event: str, level: str = "info", **fields: Any) -> None:
    """Hand a line on to the thread that writes. Returns at once."""
    if _LEVELS[level.upper()] >= _settings.level:
        _writer.write(_line(event, level, fields))


def _line(event: str, level: str, fields: dict[str, Any]) -> str:
    now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": level, "event": event} | fields, default=str)


_writer = LogWriter(lambda count: _line("dropped", "warning", {"lines": count}))


def dropped() -> int:
    """Lines that were dropped because nobody read the log."""
    return _writer.dropped


def flush(seconds: float = 1.0) -> None:
    """Wait for the lines so far to be written, for at most so long."""
    _writer.flush(seconds)


def refusal(told: ApiError, error: BaseException) -> None:
    """Record why a request was refused."""
    fields = record()
    fields["error"] = str(told) if _settings.words else told.without_quotes
    if told.param is not None:
        fields["param"] = told.param
    if told.status == 500:
        defect(error)


def defect(error: BaseException) -> None:
    """Log a bug with its traceback. The client gets no details."""
    text = "".join(traceback.format_exception(error))
    write("defect", "error", id=record().get("id"), error=f"{type(error).__name__}: {error}", traceback=text)


class Handler(logging.Handler):
    """Writes the log of libraries and of the scheduler in the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info is not None and record.exc_info[1] is not None:
            fields["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        write("log", record.levelname.lower(), **fields)
