"""The folder of a cache: its files, their total size, and which of them go first.

``DIR/<group>/<piece>.safetensors``, where a group has one bundle, adapter, API key and set of kernels. Several processes
may write and remove files at any time. Files with other names are never touched.
"""

import contextlib
import itertools
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm4_runtime.errors import RequestError
from glm4_runtime.prefix_store.piece import TOKENS

ABOUT = "about.json"  # describes a group to people; never read by a session
_GROUP = re.compile(r"[0-9a-f]{32}")
_PIECE = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9]+-[0-9]+\.tmp")
_ABANDONED = 600.0  # seconds without a change; then the writer of a temporary file is dead
_MOST_ABOUT = 1 << 16  # bytes
_numbers = itertools.count()


@dataclass(frozen=True)
class Found:
    """A piece on the disk."""

    path: Path
    bytes: int
    used_ns: int


@dataclass(frozen=True)
class Entry:
    """A group of pieces.

    Attributes:
        bundle: the name of the bundle's folder when the first piece was written.
        adapter: the adapter's name; empty for the base model.
        tokens: number of tokens whose keys and values are stored.
        used: when a piece was last written or read, in seconds since 1970.
    """

    group: str
    bundle: str
    adapter: str
    bytes: int
    tokens: int
    used: float


class CacheFolder:
    """A cache's folder, which only its owner may read and write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            RequestError: it cannot be made, or other users may write to it.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.path.stat()
        except OSError as error:
            raise RequestError(
                f"the cache folder {self.path} cannot be used: {error.strerror}; choose another --cache"
            ) from error
        if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
            raise RequestError(
                f"other users may write to the cache folder {self.path}; choose a folder of your own, or run: "
                f"chmod 700 {self.path}"
            )

    def require(self) -> None:
        """Raises :class:`RequestError` if there is no such folder."""
        if not self.path.is_dir():
            raise RequestError(f"{self.path} is no cache folder; give the folder of --cache")

    def open_group(self, group: str, about: dict[str, str]) -> Path:
        """Make the folder of a group. Raises OSError."""
        folder = self.path / group
        folder.mkdir(mode=0o700, exist_ok=True)
        if not (folder / ABOUT).exists():
            write_atomically(folder / ABOUT, [json.dumps(about).encode()])
        return folder

    def pieces(self) -> list[Found]:
        """All pieces, least recently used first. Removes temporary files of processes that are gone."""
        found = []
        for folder in self._groups():
            for entry in _entries(folder):
                status = _status(entry)
                if status is None:
                    continue
                if _PIECE.fullmatch(entry.name):
                    found.append(Found(Path(entry.path), status.st_size, status.st_mtime_ns))
                elif _TEMPORARY.fullmatch(entry.name) and time.time() - status.st_mtime > _ABANDONED:
                    remove(Path(entry.path))
        return sorted(found, key=lambda one: one.used_ns)

    def shrink(self, most: int) -> int:
        """Remove pieces, least recently used first, until at most ``most`` bytes are left. Returns the bytes left."""
        found = self.pieces()
        total = sum(one.bytes for one in found)
        for one in found:
            if total <= most:
                break
            remove(one.path)
            total -= one.bytes
        return total

    def entries(self) -> list[Entry]:
        """The groups that hold pieces, last used first."""
        by_group: dict[str, list[Found]] = {}
        for one in self.pieces():
            by_group.setdefault(one.path.parent.name, []).append(one)
        entries = [self._entry(group, pieces) for group, pieces in by_group.items()]
        return sorted(entries, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove all pieces. Returns the number of bytes."""
        total = 0
        for folder in self._groups():
            for entry in _entries(folder):
                status = _status(entry)
                if status is not None and (_PIECE.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name)):
                    total += status.st_size
                    remove(Path(entry.path))
            remove(folder / ABOUT)
            with contextlib.suppress(OSError):  # a foreign file is in it, or a process has just written one
                folder.rmdir()
        return total

    def _groups(self) -> Iterator[Path]:
        for entry in _entries(self.path):
            if _GROUP.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)

    def _entry(self, group: str, pieces: Sequence[Found]) -> Entry:
        about = _about(self.path / group / ABOUT)
        return Entry(
            group,
            about.get("bundle", "unknown"),
            about.get("adapter", ""),
            sum(one.bytes for one in pieces),
            len(pieces) * TOKENS,
            max(one.used_ns for one in pieces) / 1e9,
        )


def write_atomically(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file under a temporary name, and rename it. Raises OSError, and leaves no file then."""
    aside = path.with_name(f".{os.getpid()}-{next(_numbers)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(aside, flags, 0o600), "wb", buffering=0) as file:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
        aside.replace(path)
    except BaseException:
        remove(aside)
        raise


def remove(path: Path) -> None:
    """Remove a file, if this is possible."""
    with contextlib.suppress(OSError):
        path.unlink()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # removed meanwhile, or not readable
        return []


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    with contextlib.suppress(OSError):  # removed meanwhile
        status = entry.stat(follow_symlinks=False)
        return status if stat.S_ISREG(status.st_mode) else None
    return None


def _about(path: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        found = json.loads(file.read(_MOST_ABOUT))
        if isinstance(found, dict):
            return {str(name): str(value)[:200] for name, value in found.items()}
    return {}
