"""Handles SIGINT, SIGTERM and SIGHUP: the command cleans up, prints "interrupted" and exits with 130.

The first signal ends the command and further ones change nothing. There are three phases: before a command
begins (:func:`exit_at_once`), while it runs (:func:`raise_once`), and once its exit code is fixed (:func:`end`).
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 130
MESSAGE = "glm4-deploy: interrupted"
# Windows has neither.
HANGUPS = tuple(getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name))
ALARMS = tuple(getattr(signal, name) for name in ("SIGALRM",) if hasattr(signal, name))

_received: int | None = None
_held = False
_before: dict[int, Any] = {}


def exit_at_once() -> None:
    """Exit at a signal, until :func:`raise_once`. Nothing is written yet, so there is nothing to clean up."""
    for number in _ending():
        signal.signal(number, _exit)


@contextmanager
def exiting() -> Iterator[None]:
    """Use :func:`exit_at_once` during the block, which must not write anything."""
    try:
        before = {number: signal.signal(number, _exit) for number in _ending()}
    except ValueError:  # only the main thread may set handlers, and only it receives signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_once() -> None:
    """From now on the first signal raises KeyboardInterrupt in the main thread, and the others are ignored."""
    global _received
    _received = None
    for number in _ending():
        _before[number] = signal.signal(number, _raise)
    for number in ALARMS:
        _before[number] = signal.signal(number, _raise_again)
    sys.unraisablehook = _unraisable


def end(*, restore: bool) -> None:
    """Ignore signals until the interpreter ends, or ``restore`` the handlers from before :func:`raise_once`."""
    for number in [*_ending(), *ALARMS]:
        signal.signal(number, _before.get(number, signal.SIG_DFL) if restore else signal.SIG_IGN)
    if restore:
        sys.unraisablehook = sys.__unraisablehook__


def received() -> bool:
    """Whether a signal that ends the command arrived."""
    return _received is not None


def check() -> None:
    """Raise the KeyboardInterrupt that was held back or that a library swallowed. Long work calls this too."""
    if received():
        raise KeyboardInterrupt


@contextmanager
def held(held: bool = True) -> Iterator[None]:
    """Hold a signal back until the block ends, such as a cleanup. ``held(False)`` inside allows it again."""
    global _held
    before, _held = _held, held
    try:
        yield
    finally:
        _held = before
    if not _held:
        check()


def forgive() -> None:
    """Continue after a Ctrl-C that stopped a part of the work, such as one answer. Other signals still end the
    command."""
    global _received
    if _received not in (None, signal.SIGINT):
        raise KeyboardInterrupt
    _received = None


def _ending() -> list[signal.Signals]:
    """The signals that end a command. SIGHUP only if it was not ignored, as by ``nohup`` or a service manager."""
    hangups = [number for number in HANGUPS if signal.getsignal(number) is not signal.SIG_IGN]
    return [signal.SIGINT, signal.SIGTERM, *hangups]


def _exit(_number: int, _frame: FrameType | None) -> None:
    try:
        os.write(2, f"{MESSAGE}\n".encode())
    finally:
        os._exit(EXIT_CODE)


def _raise(number: int, _frame: FrameType | None) -> None:
    global _received
    if _received is None:
        _received = number
        if not _held:
            raise KeyboardInterrupt


def _raise_again(_number: int, _frame: FrameType | None) -> None:
    if received() and not _held:
        raise KeyboardInterrupt


def _unraisable(lost: "sys.UnraisableHookArgs") -> None:
    """A KeyboardInterrupt in a destructor or in a weak reference's callback is lost, so raise it again soon."""
    if sys.platform != "win32" and received() and lost.exc_type is KeyboardInterrupt and ALARMS:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(lost)
