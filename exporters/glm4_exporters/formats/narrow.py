"""A format for matrices that are not quantized, in the checkpoint's own 16-bit type."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glm4_exporters.formats.base import CODES, Encoded, Format, InputRounding, Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Narrow(Format):
    """Values in 16 bits. The graph casts them to the activations' type.

    Attributes:
        dtype: ``bfloat16`` or ``float16``.
    """

    dtype: str
    bits: int = 16
    block: int | None = None
    inputs: InputRounding | None = None
    portable: ClassVar[bool] = False

    def parts(self, rows: int, width: int, scale_type: str) -> dict[str, Part]:
        return {CODES: Part(self.dtype, (rows, width))}

    def encode(
        self,
        rows: "Tensor",
        scale_type: "torch.dtype",
        *,
        importance: "Tensor | None" = None,
        largest: float | None = None,
    ) -> Encoded:
        """``codes`` [rows, width] in 16 bits: exact for values that the checkpoint has in this type."""
        import torch

        return {CODES: rows.to(getattr(torch, self.dtype))}

    def decode(self, parts: Encoded, width: int) -> "Tensor":
        return parts[CODES].float()
