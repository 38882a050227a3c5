"""The options --cache and --cache-bytes, and the store that they open."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glm4_runtime.prefix_store.limits import DEFAULT_BYTES

if TYPE_CHECKING:
    from glm4_runtime import Session
    from glm4_runtime.prefix_store.store import PrefixStore

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("KMGT", 1)}
LEAST_BYTES = 10**6


class ByteCount(click.ParamType[int]):
    """A size such as 20G or 512Mi, as a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?i?)B?", str(value).strip(), re.IGNORECASE | re.ASCII)
        unit = match and {name.upper(): size for name, size in _UNITS.items()}.get(match[2].upper())
        if match is None or unit is None or len(str(value)) > 20:
            self.fail(
                f"{str(value)[:100]!r} is no size; write bytes, or a number such as 20G or 512Mi", param, ctx
            )
        size = int(float(match[1]) * unit)
        if size < LEAST_BYTES:
            self.fail(f"{value} is too small for a prefix cache; give at least 1M", param, ctx)
        return size


def cache_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add --cache and --cache-bytes to a command."""
    size = click.option(
        "--cache-bytes",
        type=ByteCount(),
        default=DEFAULT_BYTES,
        show_default="20G",
        metavar="SIZE",
        help="Maximum size of the prefix cache, such as 20G or 512Mi. What was not used for longest is removed first.",
    )
    folder = click.option(
        "--cache",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Folder of a prefix cache: prompts start from what this or an earlier process computed. On CPUs.",
    )
    return folder(size(function))


@contextlib.contextmanager
def opened(session: "Session", folder: Path | None, most_bytes: int) -> "Iterator[PrefixStore | None]":
    """The store in a folder until the end of the block. None without a folder."""
    if folder is None:
        yield None
        return
    from glm4_runtime.prefix_store.store import PrefixStore

    store = PrefixStore(folder, most_bytes, session)
    try:
        yield store
    finally:
        store.close()
