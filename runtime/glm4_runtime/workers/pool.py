"""Worker processes for untrusted input. A task may crash its worker, hang or fill memory; this process continues.

Tasks and answers are JSON values. A worker is a plain subprocess, so the pool needs no fork and works on every
system.
"""

import os
import threading
import weakref
from typing import Any

from glm4_runtime.errors import BundleError
from glm4_runtime.workers import frames
from glm4_runtime.workers.worker import TaskLimits, Worker


class WorkerPool:
    """Up to ``most`` workers that run one module's ``main``. Safe to use from any thread.

    A worker starts when needed. A call waits for a worker at most until earlier calls reach their limits.
    """

    def __init__(self, module: str, limits: TaskLimits, most: int = 2) -> None:
        self._module, self._limits, self._most = module, limits, most
        self._reset()
        _POOLS.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._idle: list[Worker] = []
        self._count = 0

    def start(self) -> None:
        """Start a first worker in the background, so that it is ready for the first call."""
        with self._changed:
            if self._count:
                return
            self._count += 1
        self._release(self._new())

    def call(self, task: Any) -> Any:
        """Send ``task``, plain JSON data, to a worker; returns the answer.

        Raises :class:`WorkerError` if the task reached a limit or ended its worker, :class:`BundleError` if no worker
        can start, and TypeError, ValueError or RecursionError if ``task`` is no JSON data.
        """
        data = frames.encode(task)
        worker = self._take()
        try:
            return worker.ask(data)
        finally:
            self._release(worker)

    def close(self) -> None:
        """End idle workers. A later call starts new ones."""
        with self._changed:
            idle, self._idle = self._idle, []
            self._count -= len(idle)
        for worker in idle:
            worker.end()

    def _take(self) -> Worker:
        with self._changed:
            while not self._idle and self._count >= self._most:
                self._changed.wait()
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
                self._count -= 1
            self._count += 1
        return self._new()

    def _new(self) -> Worker:
        """A new worker; the caller has counted it already."""
        try:
            return Worker(self._module, self._limits)
        except OSError as error:
            self._forget_one()
            raise BundleError(f"a worker process cannot be started: {error}") from error

    def _release(self, worker: Worker) -> None:
        """Keep a worker for the next call. A spent worker ends, and a new one replaces it."""
        if worker.spent:
            worker.end()
            worker = self._new()
        with self._changed:
            self._idle.append(worker)
            self._changed.notify()

    def _forget_one(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify()


_POOLS: "weakref.WeakSet[WorkerPool]" = weakref.WeakSet()


def _after_fork() -> None:
    """Workers belong to the process that started them."""
    for pool in _POOLS:
        pool._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
