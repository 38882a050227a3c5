"""An exclusive lock on a file, on POSIX and Windows. The system frees the lock when the process ends in any way."""

import errno
import os
from importlib import import_module
from pathlib import Path
from typing import Any


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:  # of another system
        return None


POSIX, WINDOWS = _module("fcntl"), _module("msvcrt")


def lock(path: Path) -> int:
    """Create the file if needed, and lock it. Closing the returned descriptor unlocks it.

    Raises:
        BlockingIOError: another process holds the lock.
        FileNotFoundError: the file was removed meanwhile, so the lock has no effect.
        OSError: there are no locks: ENOSYS, or the file system's own error.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(file)
        if not os.path.samestat(os.fstat(file), path.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(file)
        raise
    return file


def _take(file: int) -> None:
    if POSIX is not None:
        POSIX.flock(file, POSIX.LOCK_EX | POSIX.LOCK_NB)
        return
    if WINDOWS is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    try:
        WINDOWS.locking(file, WINDOWS.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (
            errno.EACCES,
            errno.EDEADLK,
        ):  # Windows' error if another process holds the lock
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        raise
