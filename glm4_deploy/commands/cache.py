"""glm4-deploy cache DIR"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glm4_deploy import show
from glm4_runtime.errors import one_line

if TYPE_CHECKING:
    from glm4_runtime.prefix_store.folder import Entry


@click.command("cache")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--clear", is_flag=True, help="Remove all prefixes. Other files in DIR stay.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def command(folder: Path, clear: bool, as_json: bool) -> None:
    """List the prefix cache in DIR, the folder of --cache: size, tokens, bundle and age."""
    from glm4_runtime.prefix_store.folder import CacheFolder

    cache = CacheFolder(folder)
    cache.require()
    if clear:
        freed = cache.clear()
        if as_json:
            show.print_json({"removed_bytes": freed})
        else:
            click.echo(f"removed {show.readable_size(freed)}")
        return
    entries = cache.entries()
    if as_json:
        show.print_json({"entries": [asdict(entry) for entry in entries]})
        return
    for entry in entries:
        click.echo(_line(entry))
    total, tokens = sum(entry.bytes for entry in entries), sum(entry.tokens for entry in entries)
    click.echo(f"{_amount(total, tokens)}  in all")


def _line(entry: "Entry") -> str:
    name = one_line(entry.bundle, 80) + (f" with {one_line(entry.adapter, 80)}" if entry.adapter else "")
    age = show.duration(max(0.0, time.time() - entry.used))
    return f"{_amount(entry.bytes, entry.tokens)}  {name}, used {age} ago"


def _amount(count: int, tokens: int) -> str:
    return f"{show.readable_size(count):>10}  {tokens:>9} tokens"
