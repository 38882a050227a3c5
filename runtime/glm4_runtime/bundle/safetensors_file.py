"""One safetensors file: its header is read and checked at once, its data on request."""

import hashlib
import math
import os
import re
import stat
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm4_runtime.bundle.file_positions import READ_ONLY, read_at
from glm4_runtime.bundle.json_file import parse_object
from glm4_runtime.bundle.onnx_file import MOST_AXES
from glm4_runtime.errors import CheckpointError, shown

PAGE = 4096
MAX_HEADER = 32 << 20  # bytes; that of 61 layers takes 100 KB, and the format itself allows 100 MB
LONGEST_TENSOR_NAME = 500
DTYPE_OF_CODE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
BITS_OF_CODE = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
LFS_POINTER = b"version https://git-lfs"
BLOB_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where a tensor lies: ``nbytes`` bytes from ``offset`` on in ``file``, row-major, little-endian."""

    name: str
    dtype: str  # bfloat16, float16 or float32
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def _open_direct(fd: int) -> int:
    """Open a file for reads that bypass the page cache; -1 if the file system cannot."""
    if sys.platform != "linux":
        return -1
    try:
        return os.open(f"/proc/self/fd/{fd}", READ_ONLY | os.O_DIRECT)
    except OSError:
        return -1


@dataclass
class SafetensorsFile:
    """An open safetensors file: 8 bytes of header length, a JSON header, the data without gaps."""

    path: Path
    headers: dict[str, TensorHeader] = field(init=False)
    header_sha256: bytes = field(init=False)
    _direct: int | None = field(
        init=False, default=None
    )  # a descriptor that bypasses the page cache, opened on first use

    def __post_init__(self) -> None:
        try:
            self._fd = os.open(self.path, READ_ONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        self._close = weakref.finalize(self, os.close, self._fd)
        self._stat = os.fstat(self._fd)
        if not stat.S_ISREG(self._stat.st_mode):
            raise CheckpointError(f"{self.path} is not a file")
        self._read_headers()

    @property
    def identity(self) -> str:
        """The content hash if the file is in a hub cache; otherwise size and time of change."""
        blob = self.path.resolve()
        if self.path.is_symlink() and blob.parent.name == "blobs" and BLOB_NAME.fullmatch(blob.name):
            return blob.name
        return f"{self._stat.st_size} {self._stat.st_mtime_ns}"

    @property
    def content(self) -> str:
        """SHA-256 of the file: from its name in a hub cache, otherwise by reading the whole file."""
        if len(self.identity) == 64:
            return self.identity
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error

    def close(self) -> None:
        self._close()
        self._fd = -1  # the system may reuse the number for another file

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` with bytes from ``offset`` on. Refuses a file that changed after it was opened."""
        if self._fd < 0:
            raise ValueError(f"{self.path} is closed")
        while target:
            try:
                count = read_at(self._fd, target, offset)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self.path} was cut short after it was opened; download it again")
            target, offset = target[count:], offset + count
        self._require_unchanged()

    def read_pages_into(self, target: memoryview, offset: int, count: int) -> bool:
        """Fill the page-aligned ``target`` from a page-aligned position, bypassing the page cache.

        Returns whether ``count`` bytes were read; False if the file system has no such reads.
        """
        if self._direct is None:
            self._direct = _open_direct(self._fd)
            if self._direct >= 0:
                weakref.finalize(self, os.close, self._direct)
        if self._direct < 0 or self._fd < 0:
            return False
        done, wanted = 0, -(-count // PAGE) * PAGE
        while done < count:
            try:
                found = read_at(self._direct, target[done:wanted], offset + done)
            except OSError:
                return False
            done += found
            if found == 0 or (done % PAGE and done < count):
                return False
        self._require_unchanged()
        return True

    def _require_unchanged(self) -> None:
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise CheckpointError(
                f"{self.path} changed while it was read; run again when nothing writes to it"
            )

    def _read_headers(self) -> None:
        size = self._stat.st_size
        try:
            begun = bytearray(len(LFS_POINTER))
            start = bytes(begun[: read_at(self._fd, memoryview(begun), 0)])
        except OSError as error:  # a file of /proc, say
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error
        if start == LFS_POINTER:
            raise CheckpointError(f"{self.path} is a Git LFS pointer, not the weights; run: git lfs pull")
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{self.path} is cut short or no safetensors file ({size} bytes); download it again"
            )
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{self.path} has a header of {length} bytes, but at most {MAX_HEADER} are read; download it again"
            )
        data = bytearray(length)
        self.read_into(memoryview(data), 8)
        self.header_sha256 = hashlib.sha256(data).digest()
        entries = parse_object(bytes(data), f"the header of {self.path}", CheckpointError)
        entries.pop("__metadata__", None)
        spans = {name: self._span(name, entry) for name, entry in entries.items()}
        end = 0
        for name, (begin, after) in sorted(spans.items(), key=lambda item: item[1]):
            if begin != end:
                self._refuse(name, f"begins at {begin}, but the tensor before it ends at {end}")
            end = after
        if end != size - 8 - length:
            raise CheckpointError(
                f"{self.path} has {size - 8 - length} bytes of weights, its header says {end}; download it again"
            )
        self.headers = {
            name: TensorHeader(
                name=name,
                dtype=DTYPE_OF_CODE.get(entry["dtype"], entry["dtype"]),
                shape=tuple(entry["shape"]),
                file=self.path,
                offset=8 + length + spans[name][0],
                nbytes=spans[name][1] - spans[name][0],
            )
            for name, entry in entries.items()
        }

    def _span(self, name: str, entry: Any) -> tuple[int, int]:
        """The tensor's first byte and the byte after its last, checked against type and shape."""
        if len(name) > LONGEST_TENSOR_NAME:
            self._refuse(
                name, f"has a name of {len(name)} characters, but at most {LONGEST_TENSOR_NAME} are read"
            )
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            self._refuse(name, "has not exactly a dtype, a shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in BITS_OF_CODE:
            self._refuse(name, f"has the unknown dtype {shown(code)}")
        for what, values in (("shape", shape), ("data_offsets", offsets)):
            if not (isinstance(values, list) and len(values) <= MOST_AXES and all(map(_is_size, values))):
                self._refuse(name, f"has the {what} {shown(values)}, not a list of at most {MOST_AXES} sizes")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            self._refuse(name, f"has the data_offsets {shown(offsets)}, not a begin and an end")
        bits = math.prod(shape) * BITS_OF_CODE[code]
        if bits != 8 * (offsets[1] - offsets[0]):
            self._refuse(name, f"takes {offsets[1] - offsets[0]} bytes, but {code} {shape} takes {bits // 8}")
        return offsets[0], offsets[1]

    def _refuse(self, name: str, what: str) -> None:
        raise CheckpointError(f"{self.path} is damaged: the tensor {shown(name)} {what}; download it again")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
