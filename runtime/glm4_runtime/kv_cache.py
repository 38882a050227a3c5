"""Maps slots to rows of the KV cache, and records their lengths. Sessions own the memory.

A slot is the caller's name for one sequence; a row is a place in the cache. A decode step runs on consecutive rows, the
first ones unless stages overlap. So slots that take part are moved there when the set changes, and stay there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SMALLEST_BUCKET = 256


@dataclass(frozen=True)
class Move:
    """Copy ``length`` positions of row ``source`` to row ``target``; swap them if both are in use."""

    source: int
    target: int
    length: int
    swapped_length: int = 0


def bucket(length: int, limit: int) -> int:
    """The capacity for ``length`` positions: a power of two, at most the limit."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


class SlotTable:
    """Rows and lengths of the slots 0 ... count - 1."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._slot_in_row: list[int | None] = [None] * count
        self._row_of: dict[int, int] = {}
        self._length: dict[int, int] = {}
        self._expected: dict[int, int] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._row_of

    def row(self, slot: int) -> int:
        return self._row_of[slot]

    def slot(self, row: int) -> int | None:
        """The slot in a row; None if the row is not in use."""
        return self._slot_in_row[row]

    def length(self, slot: int) -> int:
        """Positions of the slot; 0 where it is not in use."""
        return self._length.get(slot, 0)

    def longest(self) -> int:
        return max(self._length.values(), default=0)

    def needed(self) -> int:
        """Positions for which each row needs room: the longest slot, or the most that a slot expects."""
        longest = self.longest()
        return max(longest, *self._expected.values()) if self._expected else longest

    def expect(self, slot: int, length: int) -> None:
        """Say how many positions a slot will have soon. 0: no more than it has. A shorter length than before ends the
        expectation."""
        if length:
            self._expected[slot] = length
        else:
            self._expected.pop(slot, None)

    def free(self) -> list[int]:
        """Slots not in use, in order."""
        return [slot for slot in range(self.count) if slot not in self._row_of]

    def add(self, slot: int) -> int:
        """Take a row for a slot that is not in use."""
        row = self._slot_in_row.index(None)
        self._slot_in_row[row], self._row_of[slot], self._length[slot] = slot, row, 0
        return row

    def set_length(self, slot: int, length: int) -> None:
        if self._expected and not self._length[slot] <= length < self._expected.get(slot, 0):
            self._expected.pop(slot, None)
        self._length[slot] = length

    def remove(self, slot: int) -> None:
        self._slot_in_row[self._row_of.pop(slot)] = None
        del self._length[slot]
        self._expected.pop(slot, None)

    def nearest(self, slots: Sequence[int]) -> int:
        """The first of consecutive rows to which ``slots`` can be gathered by the fewest moves."""
        rows = {self._row_of[slot] for slot in slots}
        return max(
            range(self.count - len(rows) + 1),
            key=lambda first: len(rows & set(range(first, first + len(rows)))),
        )

    def gather(self, slots: Sequence[int], first: int = 0) -> Iterator[Move]:
        """Move ``slots`` to consecutive rows from ``first`` on. Yields moves; the caller must carry out each before it asks for the next.

        A move takes effect when the next one is asked for. So a failed move leaves both slots where they are.
        """
        wanted = set(slots)
        targets = range(first, first + len(slots))
        outside = [slot for slot in slots if self._row_of[slot] not in targets]
        for target in targets:
            other = self._slot_in_row[target]
            if other in wanted:
                continue
            slot = outside.pop()
            source = self._row_of[slot]
            yield Move(source, target, self._length[slot], 0 if other is None else self._length[other])
            self._slot_in_row[target], self._slot_in_row[source] = slot, other
            self._row_of[slot] = target
            if other is not None:
                self._row_of[other] = source

    def in_row_order(self, slots: Sequence[int]) -> list[int]:
        return sorted(slots, key=self._row_of.__getitem__)
