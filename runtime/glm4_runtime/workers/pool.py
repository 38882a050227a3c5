"""Worker processes for the input of strangers. A task may crash its worker, hang or fill memory; this process goes on.

A task and its answer are JSON values. The worker is a plain subprocess, so the pool needs no fork and runs wherever
Python does.
"""

import os
import threading
import weakref
from typing import Any

from glm4_runtime.errors import BundleError
from glm4_runtime.workers import frames
from glm4_runtime.workers.worker import Limits, Worker


class WorkerPool:
    """Up to ``most`` workers that run one module's ``main``; usable from any thread.

    A worker is started when it is needed. A call waits for one, at most until the calls before it reach their limits.
    """

    def __init__(self, module: str, limits: Limits, most: int = 2) -> None:
        self._module, self._limits, self._most = module, limits, most
        self._reset()
        _POOLS.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._idle: list[Worker] = []
        self._count = 0

    def start(self) -> None:
        """Start a first worker and return before it is ready, so that the first call finds it warm."""
        with self._changed:
            if self._count:
                return
            self._count += 1
        self._release(self._new())

    def call(self, task: Any) -> Any:
        """The worker's answer to ``task``, which must be plain JSON data.

        Raises :class:`WorkerError` where the task reached a limit or ended its worker, :class:`BundleError` where
        no worker can be started, and TypeError, ValueError or RecursionError where ``task`` is no JSON data.
        """
        data = frames.encode(task)
        worker = self._take()
        try:
            return worker.ask(data)
        finally:
            self._release(worker)

    def close(self) -> None:
        """End the workers that are idle. A later call starts new ones."""
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
        """A new worker, which is counted already."""
        try:
            return Worker(self._module, self._limits)
        except OSError as error:
            self._forget_one()
            raise BundleError(f"a worker process cannot be started: {error}") from error

    def _release(self, worker: Worker) -> None:
        """Keep a worker for the next call. A spent one ends, and the next one starts in its place."""
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
    """The workers belong to the process that started them."""
    for pool in _POOLS:
        pool._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
