"""What every stored format says of itself. Needs no torch, so that reading the tables loads none."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CODES, SCALES = "codes", "scales"
BITS = {"int4": 4, "uint8": 8, "int8": 8, "float8e4m3fn": 8, "float16": 16, "bfloat16": 16, "float32": 32}

# Parts of a matrix by name. ``codes`` are one number per element [rows, width], not packed yet; they may go on past the
# width to the end of the last block. A part of the whole matrix has no axes.
Encoded = Mapping[str, "Tensor"]


def scale_type(activations: str) -> str:
    """Element type of 16-bit scales: bfloat16 for float32, of which a scale needs the range and no more digits."""
    return "bfloat16" if activations == "float32" else activations


@dataclass(frozen=True)
class Part:
    """One array that a matrix is stored as.

    Attributes:
        dtype: element type by ONNX's name in lower case, as ``int4`` or ``float8e4m3fn``.
        shape: [rows, width], [rows, blocks], [rows] or [].
        scaled_by: the part that this one is multiplied by; None where its numbers are values.
    """

    dtype: str
    shape: tuple[int, ...]
    scaled_by: str | None = None

    @property
    def nbytes(self) -> int:
        return -(-prod(self.shape) * BITS[self.dtype] // 8)


@dataclass(frozen=True)
class InputRounding:
    """How a product rounds its input: under one scale per matrix, found on calibration text.

    Attributes:
        dtype: element type; targets that take unsigned integers only store ``int8`` around 128.
        largest: the largest number of that type.
        searched: the scale is searched for together with a smoothing, by the error of the product. Else it is the
            one under which nothing is clipped.
    """

    dtype: str
    largest: float
    searched: bool = False

    def scale(self, absmax: float) -> float:
        """The scale under which ``absmax`` is the largest number; never below float16's smallest normal number."""
        return max(absmax / self.largest, 2.0**-14)


class Format(ABC):
    """How the numbers of a matrix [rows, width] are stored.

    Attributes:
        bits: of one code.
        block: codes of a row under one scale; None for a scale per row or per matrix.
        inputs: what the matrix's product rounds its input to; None where it reads the input as it is.
        needs_largest: whether ``encode`` must know the largest magnitude of the whole matrix.
        fitted: whether GPTQ may choose the codes by calibration text.
        portable: whether every target can store it, so that a recipe may name it.
    """

    bits: int
    block: int | None
    inputs: InputRounding | None
    needs_largest: ClassVar[bool] = False
    fitted: ClassVar[bool] = False
    portable: ClassVar[bool] = True

    @abstractmethod
    def parts(self, rows: int, width: int, scale_type: str) -> dict[str, Part]:
        """The arrays of a matrix, in the order in which a file holds them; ``scale_type`` is for 16-bit scales."""

    @abstractmethod
    def encode(
        self,
        rows: "Tensor",
        scale_type: "torch.dtype",
        *,
        importance: "Tensor | None" = None,
        largest: float | None = None,
    ) -> Encoded:
        """The parts of some rows.

        Args:
            rows: float32 [rows, width].
            importance: float32 [width], how much the square of an input's error counts; all alike where None.
            largest: the largest magnitude of the whole matrix, where ``needs_largest``.
        """

    @abstractmethod
    def decode(self, parts: Encoded, width: int) -> "Tensor":
        """The values that parts stand for, float32 [rows, width]."""

    def nbytes(self, rows: int, width: int, scale_type: str) -> int:
        """Of a matrix [rows, width]."""
        return sum(part.nbytes for part in self.parts(rows, width, scale_type).values())

    @property
    def needs_text(self) -> bool:
        """Whether it cannot be made without calibration text."""
        return self.inputs is not None

    def bits_per_weight(self, scale_type: str = "float16") -> float:
        """Of a matrix of many long rows, scales counted."""
        rows, width = 1 << 20, (self.block or 1) << 20
        return round(8 * self.nbytes(rows, width, scale_type) / (rows * width), 4)

    def blocks(self, width: int) -> int:
        """Blocks of a row of ``width`` numbers; the last may be shorter."""
        return 1 if self.block is None else -(-width // self.block)
