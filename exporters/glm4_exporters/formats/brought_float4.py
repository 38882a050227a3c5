"""NVFP4 numbers of another tool, with both levels of their scales, for TensorRT's parser."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm4_exporters.formats.base import CODES, SCALES, Encoded, Part
from glm4_exporters.formats.brought import Brought
from glm4_exporters.formats.float8 import FLOAT8
from glm4_exporters.formats.nvfp4 import BLOCK, TOTAL

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BroughtFloat4(Brought):
    """As ``Nvfp4``: twice the 4-bit floats as int8, and half the matrix's scale. This scale is float32 as the tool's."""

    bits: int = 4
    block: int | None = BLOCK
    scales: str = "float32"

    def parts(self, rows: int, width: int, scale_type: str) -> dict[str, Part]:
        return {
            CODES: Part("int8", (rows, width), SCALES),
            SCALES: Part(FLOAT8, (rows, self.blocks(width)), TOTAL),
            TOTAL: Part("float32", ()),
        }

    def parser_nbytes(self, rows: int, width: int) -> int:
        return rows * width // 2

    def decode(self, parts: Encoded, width: int) -> "Tensor":
        whole = {CODES: parts[CODES], SCALES: parts[SCALES].float() * parts[TOTAL].float()}
        return super().decode(whole, width)
