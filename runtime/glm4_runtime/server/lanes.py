"""Threads for work that would block the event loop. Slow work and templates have threads of their own."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# Rendering, encoding and compiling may be slow for bodies above this size, in bytes.
_LARGE = 64 * 2**10
_QUICK_THREADS, _SLOW_THREADS = 4, 2
# These threads only wait for the worker processes that render.
_TEMPLATE_THREADS = 4

_body_bytes: contextvars.ContextVar[int] = contextvars.ContextVar("glm4_body_bytes", default=0)


def note_body(count: int) -> None:
    """Record the length of the current request's body."""
    _body_bytes.set(count)


class Lanes:
    """Pools of threads. Quick work never waits for slow work or for a chat template."""

    def __init__(self) -> None:
        self._quick = ThreadPoolExecutor(_QUICK_THREADS, "glm4-quick")
        self._slow = ThreadPoolExecutor(_SLOW_THREADS, "glm4-slow")
        self._templates = ThreadPoolExecutor(_TEMPLATE_THREADS, "glm4-templates")

    async def run(self, work: Callable[[], T], slow: bool = False) -> T:
        """Run ``work`` on a thread. Work for a request with a large body always counts as slow."""
        return await _run(self._slow if slow or _body_bytes.get() > _LARGE else self._quick, work)

    async def render(self, work: Callable[[], T]) -> T:
        """Run ``work``, which renders a chat template."""
        return await _run(self._templates, work)

    def close(self) -> None:
        """Drop waiting work; running work finishes."""
        for lane in (self._quick, self._slow, self._templates):
            lane.shutdown(wait=False, cancel_futures=True)


async def _run(lane: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(lane, lambda: context.run(work))
