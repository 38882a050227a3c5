"""Threads for work that would stop the event loop. Work that may take long has threads of its own, as have templates."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# What belongs to a body of more bytes may take long: to render, to encode, to compile.
_LARGE = 64 * 2**10
_QUICK_THREADS, _SLOW_THREADS = 4, 2
# They only wait for the worker processes that render.
_TEMPLATE_THREADS = 4

_body_bytes: contextvars.ContextVar[int] = contextvars.ContextVar("glm4_body_bytes", default=0)


def note_body(count: int) -> None:
    """Remember the length of the body of the request that is being answered."""
    _body_bytes.set(count)


class Lanes:
    """Pools of threads: what is known to be quick never waits for what may be slow, nor for a chat template."""

    def __init__(self) -> None:
        self._quick = ThreadPoolExecutor(_QUICK_THREADS, "glm4-quick")
        self._slow = ThreadPoolExecutor(_SLOW_THREADS, "glm4-slow")
        self._templates = ThreadPoolExecutor(_TEMPLATE_THREADS, "glm4-templates")

    async def run(self, work: Callable[[], T], slow: bool = False) -> T:
        """Run ``work`` on a thread. The work of a request with a large body is slow in any case."""
        return await _run(self._slow if slow or _body_bytes.get() > _LARGE else self._quick, work)

    async def render(self, work: Callable[[], T]) -> T:
        """Run ``work``, which renders a chat template."""
        return await _run(self._templates, work)

    def close(self) -> None:
        """Drop what waits; what runs goes on to its end."""
        for lane in (self._quick, self._slow, self._templates):
            lane.shutdown(wait=False, cancel_futures=True)


async def _run(lane: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(lane, lambda: context.run(work))
