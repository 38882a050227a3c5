"""Work that recurses deeply, on a thread whose stack has a known size: what the system gives differs widely."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# threading's stack size is one setting for the whole process.
_SETTING = threading.Lock()


def run_with_stack(work: Callable[[], T], size: int) -> T:
    """The result of ``work``, run on a thread of its own with a stack of ``size`` bytes. Raises what it raises."""
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
