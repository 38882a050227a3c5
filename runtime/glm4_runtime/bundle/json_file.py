"""Reads untrusted JSON within limits; anything else is refused in one line."""

import json
import os
import re
from pathlib import Path
from typing import Any, cast

from glm4_runtime.errors import Glm4Error, shown

MOST_JSON_BYTES = 64 << 20  # a config that names a million labels takes 30 MB
MOST_LEVELS = 100  # maximum levels of nested objects and lists
HALF_PAIR = re.compile(rb"\\u[dD][89abAB]")  # of an escape that may stand for no character
DOWNLOAD = "download it again"


def read_object(
    path: Path, error: type[Glm4Error], advice: str = DOWNLOAD, most_bytes: int = MOST_JSON_BYTES
) -> dict[str, Any]:
    """The JSON object in a file; see :func:`parse_object`.

    Raises:
        ``error``: also where the file cannot be read, or has more than ``most_bytes``.
    """
    return parse_object(read_small(path, error, advice, most_bytes), str(path), error, advice)


def read_small(
    path: Path, error: type[Glm4Error], advice: str = DOWNLOAD, most_bytes: int = MOST_JSON_BYTES
) -> bytes:
    """The bytes of an untrusted file.

    Raises:
        ``error``: the file cannot be read, or has more than ``most_bytes``.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(most_bytes + 1) if size <= most_bytes else b""
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}; {advice}") from cause
    if max(size, len(data)) > most_bytes:
        raise error(f"{path} has {max(size, len(data))} bytes, but at most {most_bytes} are read; {advice}")
    return data


def _in_words(cause: Exception) -> str:
    """Python's reason, but for the two whose texts speak of Python's own limits."""
    if isinstance(cause, RecursionError):
        return "it is nested too deeply"
    return "a number has thousands of digits" if "integer string conversion" in str(cause) else str(cause)


def parse_object(data: bytes, source: str, error: type[Glm4Error], advice: str = DOWNLOAD) -> dict[str, Any]:
    """A JSON object in UTF-8, without duplicate keys, with at most 100 levels and valid text.

    Raises:
        ``error``: the data is something else; the message begins with ``source`` and ends with ``advice``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise error(f"{source} is damaged: the key {shown(_first_twice(pairs))} is there twice; {advice}")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
        if HALF_PAIR.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as cause:  # of which JSON and UTF-8 errors are two
        raise error(f"{source} is damaged, it is no JSON ({_in_words(cause)}); {advice}") from cause
    if not isinstance(value, dict):
        raise error(f"{source} holds {shown(value)}, but must hold a JSON object; {advice}")
    if _too_deep(value):
        raise error(f"{source} is nested more than {MOST_LEVELS} levels deep; {advice}")
    return cast(dict[str, Any], value)


def _first_twice(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    return next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def _too_deep(value: dict[str, Any]) -> bool:
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
