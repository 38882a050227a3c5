"""JSON values over a pipe: eight bytes of length, then UTF-8 text that may hold half surrogate pairs."""

import json
from typing import IO, Any


def encode(value: Any) -> bytes:
    """Raises TypeError or ValueError if the value is no JSON data."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def write(stream: IO[bytes], data: bytes) -> None:
    stream.write(len(data).to_bytes(8, "big"))
    stream.write(data)
    stream.flush()


def read(stream: IO[bytes]) -> Any:
    """Read the next value. Raises EOFError if the stream ends before or within it."""
    head = stream.read(8)
    size = int.from_bytes(head, "big")
    data = stream.read(size) if len(head) == 8 else b""
    if len(head) < 8 or len(data) < size:
        raise EOFError
    return json.loads(data.decode("utf-8", "surrogatepass"))
