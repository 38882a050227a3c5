"""Paths for libraries that take every path for UTF-8, whatever the locale says."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DESCRIPTORS = Path("/proc/self/fd")


@contextmanager
def ascii_path(path: Path) -> Iterator[str]:
    """A path that a library written in C++ or Rust finds, in the block.

    Python writes the names of files in the encoding of the locale, as GB18030; ONNX and ONNX Runtime write them in
    UTF-8 and would find nothing. Where the two differ, the folder is opened and named by its descriptor.
    """
    if os.name == "nt" or os.fsencode(path) == str(path).encode("utf-8", "surrogateescape"):
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield str(DESCRIPTORS / str(folder) / path.name)
    finally:
        os.close(folder)
