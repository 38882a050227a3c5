"""What SIGINT, SIGTERM and SIGHUP do to a command: it cleans up, says "interrupted" and exits with 130.

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
    """Until :func:`raise_once`: nothing is written yet, so nothing is to be cleaned up."""
    for number in _ending():
        signal.signal(number, _exit)


@contextmanager
def exiting() -> Iterator[None]:
    """:func:`exit_at_once` for the block, which writes nothing either."""
    try:
        before = {number: signal.signal(number, _exit) for number in _ending()}
    except ValueError:  # only the main thread may, and only there signals arrive
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
    """Ignore signals while the interpreter ends, or ``restore`` the handlers from before :func:`raise_once`."""
    for number in [*_ending(), *ALARMS]:
        signal.signal(number, _before.get(number, signal.SIG_DFL) if restore else signal.SIG_IGN)
    if restore:
        sys.unraisablehook = sys.__unraisablehook__


def received() -> bool:
    """Whether a signal came that ends the command."""
    return _received is not None


def check() -> None:
    """Raise the KeyboardInterrupt that was held back, or that a library swallowed; long work calls this too."""
    if received():
        raise KeyboardInterrupt


@contextmanager
def held(held: bool = True) -> Iterator[None]:
    """Let the block, as one that cleans up, end before a signal raises; ``held(False)`` within it undoes that."""
    global _held
    before, _held = _held, held
    try:
        yield
    finally:
        _held = before
    if not _held:
        check()


def forgive() -> None:
    """Go on after a Ctrl-C that stopped a part of the work, as one answer; other signals end the command still."""
    global _received
    if _received not in (None, signal.SIGINT):
        raise KeyboardInterrupt
    _received = None


def expected() -> None:
    """The signal was obeyed by other means, as a server does: the command's exit code is its own."""
    global _received
    _received = None


def _ending() -> list[signal.Signals]:
    """SIGHUP too, unless ``nohup`` or a service manager had it ignored."""
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
    """A KeyboardInterrupt inside a destructor or a weak reference's callback is lost: raise it soon once more."""
    if received() and lost.exc_type is KeyboardInterrupt and ALARMS:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(lost)
