"""A file written front to back through page-aligned buffers, past the page cache, and hashed on the way."""

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from glm4_runtime.bundle.file_positions import write_at

ALIGNMENT = 4096  # bytes
WRITE_BLOCK = 32 << 20
WRITE_BUFFERS = 4


class AlignedFile:
    """Appends to a file through page-aligned buffers that two threads hash and write.

    Writes bypass the page cache if the file system allows this. A bundle is as large as the machine's memory, and a
    copy through the cache would occupy a core.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            self._fd = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            self._fd = os.open(path, flags, 0o644)
        self._memory = [mmap.mmap(-1, WRITE_BLOCK) for _ in range(WRITE_BUFFERS)]
        self._views = [torch.frombuffer(m, dtype=torch.uint8) for m in self._memory]
        self._busy: list[list[Future[None]]] = [[] for _ in range(WRITE_BUFFERS)]
        self._current, self._fill, self._written = 0, 0, 0
        self._hash = hashlib.sha256()
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("hash", "write")]

    def __enter__(self) -> "AlignedFile":
        return self

    def append(self, flat: Tensor, dtype: torch.dtype) -> None:
        """Append the elements of a 1-D tensor, cast to ``dtype``."""
        done = 0
        while done < flat.numel():
            count = min(flat.numel() - done, (WRITE_BLOCK - self._fill) // dtype.itemsize)
            end = self._fill + count * dtype.itemsize
            self._views[self._current][self._fill : end].view(dtype).copy_(flat[done : done + count])
            done, self._fill = done + count, end
            if self._fill == WRITE_BLOCK:
                self._flush()

    def pad(self) -> None:
        """Fill with zeros to the next aligned offset."""
        end = -(-self._fill // ALIGNMENT) * ALIGNMENT
        self._views[self._current][self._fill : end].zero_()
        self._fill = end
        if self._fill == WRITE_BLOCK:
            self._flush()

    @property
    def position(self) -> int:
        """Bytes appended so far."""
        return self._written + self._fill

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _flush(self) -> None:
        chunk, at = memoryview(self._memory[self._current])[: self._fill], self._written
        jobs: list[Callable[[], None]] = [lambda: self._hash.update(chunk), lambda: self._write(chunk, at)]
        self._busy[self._current] = [
            thread.submit(job) for thread, job in zip(self._threads, jobs, strict=True)
        ]
        self._written += self._fill
        self._current, self._fill = (self._current + 1) % WRITE_BUFFERS, 0
        self._wait(self._current)

    def _wait(self, index: int) -> None:
        for job in self._busy[index]:
            job.result()
        self._busy[index] = []

    def _write(self, chunk: memoryview, at: int) -> None:
        while chunk:
            written = write_at(self._fd, chunk, at)
            chunk, at = chunk[written:], at + written

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                for index in range(WRITE_BUFFERS):
                    self._wait(index)
                os.fsync(self._fd)
        finally:
            for thread in self._threads:
                thread.shutdown(wait=True, cancel_futures=True)
            os.close(self._fd)
