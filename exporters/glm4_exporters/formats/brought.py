"""A format for numbers, scales and zero points that another tool computed, stored bit for bit."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm4_exporters.formats.base import CODES, SCALES, Encoded, InputRounding, Part
from glm4_exporters.formats.integers import IntegerCodes

if TYPE_CHECKING:
    from torch import Tensor

ZEROS = "zeros"


@dataclass(frozen=True)
class Brought(IntegerCodes):
    """The codes of a checkpoint that is already quantized.

    A block may be smaller than the tool's group; then the group's scale is repeated for each block.

    Attributes:
        scales: element type of the scales.
        zeros: whether each block has a zero point, stored in the type of the codes.
        codes: element type of the codes. Empty: signed integers of ``bits`` bits.
        folded: whether the zero points of 4-bit numbers are subtracted from the codes, which are 8-bit then.
    """

    scales: str = "bfloat16"
    zeros: bool = False
    codes: str = ""
    folded: bool = False
    inputs: InputRounding | None = None

    def parts(self, rows: int, width: int, scale_type: str) -> dict[str, Part]:
        """The stored tensors by name. The scales keep the checkpoint's type; ``scale_type`` is ignored."""
        by_block = (rows,) if self.block is None else (rows, self.blocks(width))
        codes = self.codes or f"int{self.bits}"
        found = {CODES: Part(codes, (rows, width), SCALES), SCALES: Part(self.scales, by_block)}
        return found | ({ZEROS: Part(codes, by_block, SCALES)} if self.zeros else {})

    def decode(self, parts: Encoded, width: int) -> "Tensor":
        def spread(by_block: "Tensor") -> "Tensor":
            wide = by_block.float().view(len(by_block), -1)
            return wide.repeat_interleave(self.block or width, 1)[:, :width]

        codes = parts[CODES][:, :width].float()
        return (codes - spread(parts[ZEROS]) if self.zeros else codes) * spread(parts[SCALES])
