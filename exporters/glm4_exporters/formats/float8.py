"""float8_e4m3fn with one scale per matrix; inputs are rounded to the same type.

Scales per output channel build too, but TensorRT-RTX 1.7 applies them after it rounds the product to the
activations' type. Sums of codes up to 448 leave float16's range there. With one scale, TensorRT applies both
factors in float32, before the rounding.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glm4_exporters.formats.base import CODES, Encoded, Format, InputRounding, Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOAT8, FLOAT8_MAX = "float8e4m3fn", 448.0
SCALE = "scale"
FLOAT8_INPUTS = InputRounding(FLOAT8, FLOAT8_MAX)


@dataclass(frozen=True)
class Float8(Format):
    """Codes in float8_e4m3fn [rows, width], and one scale [] from the matrix's largest magnitude."""

    bits: int = 8
    block: int | None = None
    inputs: InputRounding | None = FLOAT8_INPUTS
    needs_largest: ClassVar[bool] = True
    portable: ClassVar[bool] = False

    def parts(self, rows: int, width: int, scale_type: str) -> dict[str, Part]:
        return {CODES: Part(FLOAT8, (rows, width), SCALE), SCALE: Part(scale_type, ())}

    def encode(
        self,
        rows: "Tensor",
        scale_type: "torch.dtype",
        *,
        importance: "Tensor | None" = None,
        largest: float | None = None,
    ) -> Encoded:
        """``codes`` float8_e4m3fn [rows, width] and ``scale`` []; values beyond the range saturate."""
        import torch

        assert largest is not None
        scale = torch.tensor(FLOAT8_INPUTS.scale(largest)).to(scale_type)
        codes = (rows / float(scale)).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
        return {CODES: codes, SCALE: scale}

    def decode(self, parts: Encoded, width: int) -> "Tensor":
        return parts[CODES].float() * parts[SCALE].float()
