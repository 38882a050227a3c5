"""NVFP4: 4-bit floats (E2M1), a float8 scale for each block of 16 inputs, and one more scale for the matrix.

Twice a 4-bit float is an integer of magnitude <= 12. The data file holds these integers in int8, and half the matrix's
scale, because ONNX Runtime has no kernel for 4-bit floats. ``passes.fp4_weights`` packs them for TensorRT's parser.

The matrix's scale is a power of two. So all products of scales and codes are exact in float16 and in bfloat16, and both
forms of the graph have the same weights.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glm4_exporters.formats.base import CODES, SCALES, Encoded, FittedFormat, InputRounding, Part
from glm4_exporters.formats.float8 import FLOAT8, FLOAT8_MAX

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOTAL = "total"
BLOCK = 16
LARGEST = 12  # twice the largest 4-bit float
INPUTS = InputRounding("float4e2m1", FLOAT8_MAX * LARGEST / 2, block=BLOCK)
TRIED = (6.0, 4.0)  # 4-bit floats that a block's largest magnitude may become
SMALLEST_SCALE = 2.0**-9  # of float8_e4m3fn
SMALLEST_TOTAL = 2.0**-14  # float16's smallest normal number


@dataclass(frozen=True)
class Nvfp4(FittedFormat):
    """Twice the 4-bit floats as int8 [rows, width], float8 scales [rows, width / 16], and half the matrix's scale []."""

    bits: int = 4
    block: int | None = BLOCK
    inputs: InputRounding | None = None
    needs_largest: ClassVar[bool] = True
    portable: ClassVar[bool] = False

    def parts(self, rows: int, width: int, scale_type: str) -> dict[str, Part]:
        return {
            CODES: Part("int8", (rows, width), SCALES),
            SCALES: Part(FLOAT8, (rows, self.blocks(width)), TOTAL),
            TOTAL: Part(scale_type, ()),
        }

    def parser_nbytes(self, rows: int, width: int) -> int:
        return rows * width // 2

    def encode(
        self,
        rows: "Tensor",
        scale_type: "torch.dtype",
        *,
        importance: "Tensor | None" = None,
        largest: float | None = None,
    ) -> Encoded:
        """``codes`` int8 [rows, width], ``scales`` float8_e4m3fn [rows, width / 16], ``total`` [].

        A block's largest magnitude becomes 6 or 4, by the smaller squared error. The numbers are closer to each other
        around 4.
        """
        import torch

        assert largest is not None
        total = total_scale(largest)
        blocks = rows.view(len(rows), -1, BLOCK)
        counted = 1.0 if importance is None else importance.view(1, -1, BLOCK)
        best, scales, codes = _tried(blocks, TRIED[0], total, counted)
        for number in TRIED[1:]:
            error, other_scales, other_codes = _tried(blocks, number, total, counted)
            better = error < best
            best = torch.where(better, error, best)
            scales = torch.where(better, other_scales, scales)
            codes = torch.where(better, other_codes, codes)
        return {
            CODES: codes.to(torch.int8).flatten(1),
            SCALES: scales[..., 0].to(torch.float8_e4m3fn),
            TOTAL: torch.tensor(total).to(scale_type),
        }

    def decode(self, parts: Encoded, width: int) -> "Tensor":
        steps = self.step(parts)
        blocks = parts[CODES].float().view(len(steps), -1, BLOCK)
        return (blocks * steps[..., None]).flatten(1)[:, :width]

    def step(self, parts: Encoded) -> "Tensor":
        return parts[SCALES].float() * parts[TOTAL].float()

    def nearest(self, steps: "Tensor") -> "Tensor":
        return doubled(steps)


def total_scale(largest: float) -> float:
    """Half the matrix's scale: the smallest power of two with which no block's scale exceeds float8."""
    exact = largest / LARGEST / FLOAT8_MAX
    return max(2.0 ** math.ceil(math.log2(exact)) if exact > 0 else 0.0, SMALLEST_TOTAL)


def _tried(
    blocks: "Tensor", number: float, total: float, counted: "Tensor | float"
) -> "tuple[Tensor, Tensor, Tensor]":
    """Squared errors [rows, blocks, 1], scales, and codes, if each block's largest magnitude becomes ``number``."""
    import torch

    wanted = blocks.abs().amax(-1, keepdim=True) / (2 * number * total)
    scales = wanted.clamp(SMALLEST_SCALE, FLOAT8_MAX).to(torch.float8_e4m3fn).float()
    codes = doubled(blocks / (scales * total))
    error = ((codes * (scales * total) - blocks).square_() * counted).sum(-1, keepdim=True)
    return error, scales, codes


def doubled(values: "Tensor") -> "Tensor":
    """The nearest of 0, 1, 2, 3, 4, 6, 8, 12 with the sign of the value; ties go to the even 4-bit float."""
    size = values.abs()
    step = 1 + (size > 4).float() + 2 * (size > 8).float()
    return ((values / step).round_() * step).clamp_(-LARGEST, LARGEST)
