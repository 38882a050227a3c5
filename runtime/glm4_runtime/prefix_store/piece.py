"""One file of the cache: keys and values of 64 consecutive tokens, and all token ids up to there.

A safetensors file. Its header follows from the facts and from the number of tokens. So the reader compares the header
byte for byte, and interprets nothing of a foreign file.
"""

import errno
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# 5 MiB of a 9B's float32 cache: long enough for a fast read. A prompt loses at most 63 tokens of a shared prefix.
TOKENS = 64
FORMAT = "glm4-deploy prefix 1"
_CODES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8"}
_SUM_BYTES = (
    4  # CRC-32 finds torn and damaged files. Only the user can write here, so no forgery is to be found.
)

Tokens = npt.NDArray[np.int32]
Block = npt.NDArray[Any]  # keys and values [2 * layers, Hkv, tokens, width]


@dataclass(frozen=True)
class Layout:
    """The element type and the shape of a piece's keys and values: [2 * layers, Hkv, 64, width].

    NumPy has no bfloat16: uint16 stands for bfloat16.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def names_of(facts: str, ids: Tokens) -> list[str]:
    """The file name of each whole piece of a sequence. A name depends on the facts and on all tokens so far."""
    so_far, names = hashlib.sha256(facts.encode()), []
    for stop in range(TOKENS, len(ids) + 1, TOKENS):
        so_far.update(ids[stop - TOKENS : stop].tobytes())
        names.append(f"{so_far.hexdigest()}.safetensors")
    return names


def encoded(facts: str, ids: Tokens, layout: Layout, block: Block) -> list[bytes | memoryview]:
    """The parts of a file, in order: header, ids, checksum, keys and values.

    Args:
        ids: all tokens of the sequence up to the end of the piece.
    """
    start = _header(facts, len(ids), layout) + ids.tobytes()
    data = np.ascontiguousarray(block).data.cast("B")
    return [start, _checksum(start, data), data]


def read(path: Path, facts: str, ids: Tokens, layout: Layout) -> Block | None:
    """The keys and values of a piece. None: the file is torn, foreign, damaged, or belongs to other tokens.

    Raises:
        OSError: the file cannot be read, such as FileNotFoundError.
    """
    start = _header(facts, len(ids), layout) + ids.tobytes()
    block = np.empty(layout.shape, layout.dtype)
    data = block.data.cast("B")
    found = bytearray(len(start) + _SUM_BYTES)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        opened = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if error.errno == errno.ELOOP:  # a symbolic link
            return None
        raise
    with os.fdopen(opened, "rb", buffering=0) as file:
        known = os.fstat(file.fileno())
        if not stat.S_ISREG(known.st_mode) or known.st_size != len(found) + len(data):
            return None
        for part in (memoryview(found), data):
            if not _fill(file, part):
                return None
    same = found[: len(start)] == start and found[len(start) :] == _checksum(start, data)
    return block if same else None


def _fill(file: Any, part: memoryview) -> bool:
    while part:
        count = file.readinto(part)
        if not count:
            return False
        part = part[count:]
    return True


def _checksum(start: bytes, data: memoryview) -> bytes:
    return zlib.crc32(data, zlib.crc32(start)).to_bytes(_SUM_BYTES, "little")


def _header(facts: str, tokens: int, layout: Layout) -> bytes:
    """The length and the JSON of a safetensors header, padded to a multiple of 8 bytes."""
    tensors: Sequence[tuple[str, str, Sequence[int], int]] = (
        ("ids", "I32", [tokens], 4 * tokens),
        ("crc32", "U32", [1], _SUM_BYTES),
        ("cache", _CODES[layout.dtype], list(layout.shape), layout.nbytes),
    )
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "facts": facts}}
    end = 0
    for name, code, shape, size in tensors:
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
