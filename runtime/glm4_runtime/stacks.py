"""Runs deep recursion on a thread with a known stack size, because system defaults differ widely."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# The stack size of threading is one setting for the whole process.
_SETTING = threading.Lock()


def run_with_stack(work: Callable[[], T], size: int) -> T:
    """Run ``work`` on a new thread with a stack of ``size`` bytes; returns its result, raises its exception."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="glm4-stack", daemon=True)
    with _SETTING:
        before = threading.stack_size(size)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
