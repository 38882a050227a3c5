"""Server-sent events: how the chunks of a streamed answer are written."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse

from glm4_runtime.server import log
from glm4_runtime.server.errors import ApiError, api_error, encode
from glm4_runtime.server.running_replies import ClientGoneError

Chunk = dict[str, Any]


@dataclass(frozen=True)
class EventStyle:
    """How an API writes its events.

    Attributes:
        named: whether each event has a line with its type.
        end: bytes after the last event.
    """

    named: bool
    end: bytes


PLAIN_EVENTS = EventStyle(named=False, end=b"data: [DONE]\n\n")
NAMED_EVENTS = EventStyle(named=True, end=b"")


async def event_stream(
    chunks: AsyncGenerator[Chunk, None], style: EventStyle, failed: Callable[[ApiError], Chunk]
) -> StreamingResponse:
    """A response of server-sent events. An error before the first chunk is raised, so that it sets the HTTP status.

    Args:
        failed: the last chunk after a later error.
    """
    first = await anext(chunks)

    async def lines() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(chunks):
            yield _event(first, style)
            try:
                async for chunk in chunks:
                    yield _event(chunk, style)
            except ClientGoneError:
                return
            except Exception as error:
                told = api_error(error)
                log.refusal(told, error)
                yield _event(failed(told), style)
            if style.end:
                yield style.end

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


def _event(data: Chunk, style: EventStyle) -> bytes:
    name = b"event: " + data["type"].encode() + b"\n" if style.named else b""
    return name + b"data: " + encode(data) + b"\n\n"
