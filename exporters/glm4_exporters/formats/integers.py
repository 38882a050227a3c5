"""Signed integers with scales: int8 and int4, one scale per block of a row or per row."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm4_exporters.formats.base import (
    CODES,
    SCALES,
    Encoded,
    FittedFormat,
    InputRounding,
    Part,
    StoredFormat,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class IntegerCodes(StoredFormat):
    """Codes of 8 or 4 bits, and a scale for each block of consecutive inputs of a row.

    Attributes:
        block: the last block of a row may be shorter. None for one scale per row.
    """

    bits: int
    block: int | None

    @property
    def largest(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def smallest(self) -> int:
        """The smallest code: -8 in 4 bits, where one more code matters; -127 in 8 bits."""
        return -self.largest - (self.bits < 8)

    @property
    def zero(self) -> int:
        """The unsigned code of 0."""
        return 1 << self.bits - 1


@dataclass(frozen=True)
class Integers(IntegerCodes, FittedFormat):
    """Signed integers that are rounded from values.

    Attributes:
        ranges: clipping ranges to try, as shares of the block's largest |w|. ``encode`` keeps the one with the
            least squared error.
        signed_scales: whether a scale may be negative. Then the block's largest |w| can always use the smallest
            code (-8 in 4 bits), which is one step larger. TensorRT requires positive scales.
    """

    ranges: tuple[float, ...]
    inputs: InputRounding | None = None
    signed_scales: bool = False

    def parts(self, rows: int, width: int, scale_type: str) -> dict[str, Part]:
        scales = (rows,) if self.block is None else (rows, self.blocks(width))
        return {CODES: Part(f"int{self.bits}", (rows, width), SCALES), SCALES: Part(scale_type, scales)}

    def encode(
        self,
        rows: "Tensor",
        scale_type: "torch.dtype",
        *,
        importance: "Tensor | None" = None,
        largest: float | None = None,
    ) -> Encoded:
        """``codes`` int8 [rows, blocks * block], zero past the width; ``scales`` [rows, blocks]."""
        from glm4_exporters.formats import rounding

        codes, scales = rounding.quantize(rows, self, scale_type, importance)
        return {CODES: codes, SCALES: scales}

    def decode(self, parts: Encoded, width: int) -> "Tensor":
        from glm4_exporters.formats import rounding

        return rounding.dequantize(parts[CODES], parts[SCALES], self, width)

    def nearest(self, steps: "Tensor") -> "Tensor":
        return steps.round_().clamp_(self.smallest, self.largest)
