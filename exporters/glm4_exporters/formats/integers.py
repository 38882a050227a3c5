"""Integers around zero under scales: int8 and int4, in blocks of a row or with one scale per row."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glm4_exporters.formats.base import CODES, SCALES, Encoded, Format, InputRounding, Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Integers(Format):
    """Codes of 8 or 4 bits, and a scale for each block of consecutive inputs of a row.

    Attributes:
        block: a row whose width is no multiple of it ends in a shorter block. None for one scale per row.
        ranges: shares of the block's largest |w| at which the largest code may stand. ``encode`` keeps the
            share that leaves the least squared error.
        signed_scales: whether a scale may be negative. The block's largest |w| can then always stand at the
            smallest code, which is one step farther out. TensorRT wants positive scales.
    """

    bits: int
    block: int | None
    ranges: tuple[float, ...]
    inputs: InputRounding | None = None
    signed_scales: bool = False
    fitted: ClassVar[bool] = True

    @property
    def largest(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def smallest(self) -> int:
        """In 4 bits the eighth negative code is worth having; in 8 the range is symmetric."""
        return -self.largest - (self.bits < 8)

    @property
    def zero(self) -> int:
        """What stands for 0 where codes are stored unsigned."""
        return 1 << self.bits - 1

    def stored_width(self, width: int) -> int:
        """Codes of a row in whole blocks."""
        return width if self.block is None else self.blocks(width) * self.block

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
