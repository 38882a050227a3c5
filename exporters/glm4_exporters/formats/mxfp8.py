"""MXFP8: float8_e4m3fn with one power of two for each block of 32 inputs.

After the OCP Microscaling Formats specification, version 1.0. The data file holds the powers of two in 16 bits, which
ONNX Runtime reads. TensorRT's parser refuses E8M0 scales; ``passes.mxfp8_weights`` gives it the exponents as bytes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glm4_exporters.formats.base import CODES, SCALES, Encoded, Format, InputRounding, Part
from glm4_exporters.formats.float8 import FLOAT8, FLOAT8_MAX

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 32
SMALLEST, LARGEST = -14, 15  # exponents whose powers of two, times float8 numbers, are exact in float16


@dataclass(frozen=True)
class Mxfp8(Format):
    """float8 codes [rows, width], and powers of two [rows, width / 32]."""

    bits: int = 8
    block: int | None = BLOCK
    inputs: InputRounding | None = None
    portable: ClassVar[bool] = False

    def parts(self, rows: int, width: int, scale_type: str) -> dict[str, Part]:
        return {
            CODES: Part(FLOAT8, (rows, width), SCALES),
            SCALES: Part(scale_type, (rows, self.blocks(width))),
        }

    def parser_nbytes(self, rows: int, width: int) -> int:
        return rows * self.blocks(width)

    def encode(
        self,
        rows: "Tensor",
        scale_type: "torch.dtype",
        *,
        importance: "Tensor | None" = None,
        largest: float | None = None,
    ) -> Encoded:
        """``codes`` float8_e4m3fn [rows, width] and ``scales`` [rows, width / 32].

        Per block, the power of two is the smallest that clips nothing, or its half if the squared error is smaller.
        """
        import torch

        blocks = rows.view(len(rows), -1, BLOCK)
        counted = 1.0 if importance is None else importance.view(1, -1, BLOCK)
        wide = (blocks.abs().amax(-1, keepdim=True) / FLOAT8_MAX).log2().ceil()
        pairs = [_tried(blocks, wide - less, counted) for less in (0, 1)]
        better = pairs[1][0] < pairs[0][0]
        scales, codes = (torch.where(better, *pair) for pair in zip(pairs[1][1:], pairs[0][1:], strict=True))
        return {CODES: codes.flatten(1).to(torch.float8_e4m3fn), SCALES: scales[..., 0].to(scale_type)}

    def decode(self, parts: Encoded, width: int) -> "Tensor":
        scales = parts[SCALES].float()
        return (parts[CODES].float().view(len(scales), -1, BLOCK) * scales[..., None]).flatten(1)[:, :width]


def _tried(
    blocks: "Tensor", exponents: "Tensor", counted: "Tensor | float"
) -> "tuple[Tensor, Tensor, Tensor]":
    """Squared errors [rows, blocks, 1], scales, and codes in float32, for these powers of two."""
    import torch

    scales = exponents.clamp(SMALLEST, LARGEST).exp2()
    codes = (blocks / scales).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).float()
    error = ((codes * scales - blocks).square_() * counted).sum(-1, keepdim=True)
    return error, scales, codes
