"""The changes that an adapter makes to rows of a weight, computed in float32.

LoRA (arXiv 2106.09685): W + s·B·A. DoRA (arXiv 2402.09353): m / |W + s·B·A| · (W + s·B·A), row by row.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ChangeRows = Callable[["Tensor", int], "Tensor"]


@dataclass(frozen=True)
class LowRank:
    """A low-rank change of rows ``first`` ... ``first + rows - 1`` of a matrix.

    Attributes:
        scaling: the factor s.
        left: reads B [rows, r]; ``right`` reads A [r, in].
        magnitude: reads DoRA's m [rows]. None: LoRA.
    """

    first: int
    rows: int
    scaling: float
    left: Callable[[], "Tensor"]
    right: Callable[[], "Tensor"]
    magnitude: Callable[[], "Tensor"] | None = None

    def opened(self) -> ChangeRows:
        """Read A and B, and return a function that changes a block of rows [n, in] in place.

        The function takes the block and the index of its first row in the whole matrix.
        """
        left, right = self.left(), self.right()
        magnitude = None if self.magnitude is None else self.magnitude()

        def change(block: "Tensor", start: int) -> "Tensor":
            here = slice(max(self.first - start, 0), min(self.first + self.rows - start, len(block)))
            if here.start >= here.stop:
                return block
            there = slice(start + here.start - self.first, start + here.stop - self.first)
            changed = block[here].addmm_(left[there], right, alpha=self.scaling)
            if magnitude is not None:
                changed *= (magnitude[there] / changed.norm(dim=1))[:, None]
            return block

        return change


@dataclass(frozen=True)
class Added:
    """A change of values ``first`` ... ``first + rows - 1`` of a bias: b + s·d."""

    first: int
    rows: int
    scaling: float
    vector: Callable[[], "Tensor"]

    def opened(self) -> ChangeRows:
        vector = self.vector()

        def change(block: "Tensor", start: int) -> "Tensor":
            here = slice(max(self.first - start, 0), min(self.first + self.rows - start, len(block)))
            if here.start < here.stop:
                there = slice(start + here.start - self.first, start + here.stop - self.first)
                block[here].add_(vector[there], alpha=self.scaling)
            return block

        return change


Change = LowRank | Added


def combined(changes: Iterable[Change]) -> ChangeRows:
    """Read the tensors of all changes. Return a function that applies the changes, in order, to a float32 copy."""
    opened = [change.opened() for change in changes]

    def change(block: "Tensor", start: int) -> "Tensor":
        import torch

        block = block.to(torch.float32, copy=True)
        for each in opened:
            block = each(block, start)
        return block

    return change
