"""Reads and writes at a position of an open file, from several threads. Windows lacks the system calls for this."""

import os
import sys
import threading

READ_ONLY = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

if sys.platform != "win32":

    def read_at(fd: int, target: memoryview, offset: int) -> int:
        """Read bytes from ``offset`` on into ``target``; returns how many, 0 at the file's end. Raises OSError."""
        return os.preadv(fd, [target], offset)

    def write_at(fd: int, data: memoryview, offset: int) -> int:
        """Write ``data`` from ``offset`` on; returns how many bytes. Raises OSError."""
        return os.pwrite(fd, data, offset)

else:
    # A descriptor has one position, so that one thread moves it at a time.
    _POSITION = threading.Lock()

    def read_at(fd: int, target: memoryview, offset: int) -> int:
        with _POSITION:
            os.lseek(fd, offset, os.SEEK_SET)
            found = os.read(fd, len(target))
        target[: len(found)] = found
        return len(found)

    def write_at(fd: int, data: memoryview, offset: int) -> int:
        with _POSITION:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, data)
