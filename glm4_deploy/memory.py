"""Memory that this process can still use: the machine's, within the limits of control groups and of the process."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Version:
    """The files of one version of control groups. The first version that exists counts."""

    kind: str  # of the file system in mountinfo
    controllers: tuple[str, ...]  # in /proc/self/cgroup; version 2 names none
    limits: tuple[str, ...]
    usage: str
    cache: str  # in memory.stat: file pages that the system drops when memory is short


VERSIONS = (
    _Version("cgroup2", ("",), ("memory.max", "memory.high"), "memory.current", "inactive_file"),
    _Version("cgroup", ("memory",), ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)  # fmt: skip


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that the process can use without swapping, and without being killed or refused; 0 if unknown.

    Args:
        root: where ``proc`` and the mount points are.
    """
    process = root / "proc" / "self"
    rooms = [_of_the_machine(root), *_of_groups(root, process), *_of_limits(process)]
    return max(0, min((room for room in rooms if room is not None), default=0))


def _of_the_machine(root: Path) -> int | None:
    for line in _lines(root / "proc" / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_groups(root: Path, process: Path) -> Iterator[int]:
    """The room in each control group of the process, and in each one above it."""
    mounts = [line.split() for line in _lines(process / "mountinfo")]
    for line in _lines(process / "cgroup"):
        _, controllers, group = line.split(":", 2)
        for version in VERSIONS:
            if not set(version.controllers) & set(controllers.split(",")):
                continue
            for fields in mounts:
                kind, _, options = fields[fields.index("-") + 1 :]
                if kind == version.kind and (kind == "cgroup2" or "memory" in options.split(",")):
                    yield from _along(root / fields[4].lstrip("/"), fields[3], group, version)


def _along(mount: Path, mounted: str, group: str, version: _Version) -> Iterator[int]:
    """The room in bytes in the group and in each group above, up to ``mounted``, the highest that a container sees."""
    try:
        folder = mount / Path(group).relative_to(mounted)
    except ValueError:  # the path is the host's, and the mount is this group
        folder = mount
    for place in (folder, *folder.parents):
        if not place.is_relative_to(mount):
            return
        limits = [_number(place / name) for name in version.limits]
        used = _number(place / version.usage)
        known = [limit for limit in limits if limit is not None]
        if known and used is not None:
            yield min(known) - used + _cached(place, version.cache)


def _cached(place: Path, name: str) -> int:
    for line in _lines(place / "memory.stat"):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _of_limits(process: Path) -> Iterator[int]:
    """The room within ``ulimit -v`` and ``ulimit -d``."""
    if sys.platform == "win32":  # without such limits
        yield from ()
    else:
        try:
            import resource
        except ImportError:  # a system with neither
            return
        pages = [int(field) for line in _lines(process / "statm") for field in line.split()]
        for limit, field in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
            soft = resource.getrlimit(limit)[0]
            if soft != resource.RLIM_INFINITY and len(pages) > field:
                yield soft - pages[field] * resource.getpagesize()


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no file or it says "max"."""
    text = next(iter(_lines(path)), "")
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text("utf-8", "surrogateescape").splitlines()
    return []
