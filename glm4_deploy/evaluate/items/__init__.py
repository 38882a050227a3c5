"""Generated test items: each kind is one file and one row of ITEM_KINDS.

Items depend on the seed alone. The SHA-256 of an item's prompt says whether the item is held out. ``eval`` asks only
held-out items; the others serve as solved examples.
"""

import random
from collections.abc import Callable, Iterator
from hashlib import sha256

from glm4_deploy.evaluate.items import calls, needle, order, records, sums
from glm4_deploy.evaluate.items.item import Item

HELD_OUT = 64  # of 256 values of the first byte of the SHA-256
TRIES = 200  # per item, before a kind is called exhausted

ITEM_KINDS: dict[str, Callable[[random.Random, int], Item]] = {
    "order": order.item,
    "sums": sums.item,
    "needle": needle.item,
    "calls": calls.item,
    "records": records.item,
}
USUAL_SIZE = {"needle": 200, "records": records.PEOPLE}  # other kinds have none


def is_held_out(item: Item) -> bool:
    return sha256(item.prompt.encode()).digest()[0] < HELD_OUT


def items(kind: str, seed: int, size: int | None = None, held_out: bool = True) -> Iterator[Item]:
    """Different items without end.

    Args:
        kind: a name of ITEM_KINDS.
        size: words in a needle's text, or people in a record's text at most. None: the usual size. Other kinds ignore it.
        held_out: the items to ask, or those for examples.

    Raises:
        ValueError: the kind has no further items.
    """
    chance, seen = random.Random(f"{kind} {seed}"), set[str]()
    size = USUAL_SIZE.get(kind, 0) if size is None else size
    while True:
        for _ in range(TRIES):
            item = ITEM_KINDS[kind](chance, size)
            if is_held_out(item) == held_out and item.prompt not in seen:
                break
        else:
            raise ValueError(f"{kind} has no more than {len(seen)} items; ask for fewer")
        seen.add(item.prompt)
        yield item
