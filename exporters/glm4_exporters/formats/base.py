"""The base classes of stored formats. Imports no torch, so that reading the tables stays quick."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from glm4_runtime.bundle.element_types import bits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CODES, SCALES = "codes", "scales"
INT8_MAX = 127  # the smallest number used is its negative
SMALLEST_SCALE = 2.0**-14  # float16's smallest normal number, the scale of zeros

# Parts of a matrix by name. ``codes`` has one number per element [rows, width], not packed yet, and may be
# padded to whole blocks. A part that belongs to the whole matrix is a scalar.
Encoded = Mapping[str, "Tensor"]


def scale_type(activations: str) -> str:
    """Element type of 16-bit scales: bfloat16 for float32 activations, because a scale needs range more than digits."""
    return "bfloat16" if activations == "float32" else activations


@dataclass(frozen=True)
class Part:
    """One array that a matrix is stored as.

    Attributes:
        dtype: element type by ONNX's name in lower case, as ``int4`` or ``float8e4m3fn``.
        shape: [rows, width], [rows, blocks], [rows] or [].
        scaled_by: name of the part that scales this one; None if the numbers are the values.
    """

    dtype: str
    shape: tuple[int, ...]
    scaled_by: str | None = None

    @property
    def nbytes(self) -> int:
        return -(-prod(self.shape) * bits(self.dtype) // 8)


@dataclass(frozen=True)
class InputRounding:
    """How a product rounds its input: with one scale per matrix, found on calibration text.

    With blocks, each block has a scale from its own largest magnitude, and the scale per matrix scales these.

    Attributes:
        dtype: element type. Targets that accept only unsigned integers store ``int8`` with an offset of 128.
        largest: the largest number of that type.
        searched: whether scale and smoothing are searched together, by the error of the product. If not, the
            scale is the smallest that clips nothing.
        block: how many inputs share one scale; None if all do.
    """

    dtype: str
    largest: float
    searched: bool = False
    block: int | None = None

    def scale(self, absmax: float) -> float:
        """The scale that maps ``absmax`` to ``largest``; at least ``SMALLEST_SCALE``."""
        return max(absmax / self.largest, SMALLEST_SCALE)


class StoredFormat(ABC):
    """How the numbers of a matrix [rows, width] are stored and read.

    Attributes:
        bits: bits of one code.
        block: how many codes of a row share one scale; None for one scale per row or per matrix.
        inputs: how the matrix's product rounds its input; None if it does not.
    """

    bits: int
    block: int | None
    inputs: InputRounding | None

    @abstractmethod
    def parts(self, rows: int, width: int, scale_type: str) -> dict[str, Part]:
        """The arrays of a matrix, in the order in which a file holds them; ``scale_type`` is for 16-bit scales."""

    @abstractmethod
    def decode(self, parts: Encoded, width: int) -> "Tensor":
        """The values that parts stand for, float32 [rows, width]."""

    def nbytes(self, rows: int, width: int, scale_type: str) -> int:
        """Bytes of a matrix [rows, width]."""
        return sum(part.nbytes for part in self.parts(rows, width, scale_type).values())

    def parser_nbytes(self, rows: int, width: int) -> int:
        """Bytes of the parts that exist only for TensorRT's parser; most formats have none."""
        return 0

    @property
    def needs_text(self) -> bool:
        """Whether this format requires calibration text."""
        return self.inputs is not None

    def bits_per_weight(self, scale_type: str = "float16") -> float:
        """Bits per weight of a large matrix, scales included."""
        rows, width = 1 << 20, (self.block or 1) << 20
        return round(8 * self.nbytes(rows, width, scale_type) / (rows * width), 4)

    def blocks(self, width: int) -> int:
        """Number of blocks in a row of ``width`` numbers; the last may be shorter."""
        return 1 if self.block is None else -(-width // self.block)

    def stored_width(self, width: int) -> int:
        """Width of a row, padded to whole blocks."""
        return width if self.block is None else self.blocks(width) * self.block


class Format(StoredFormat):
    """A stored format that values can be encoded in. ``Brought``, which only keeps another tool's numbers, is none.

    Attributes:
        needs_largest: whether ``encode`` must know the largest magnitude of the whole matrix.
        portable: whether every target can store it, so that a recipe may name it.
    """

    needs_largest: ClassVar[bool] = False
    portable: ClassVar[bool] = True

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
            importance: float32 [width], the weight of each input's squared error; equal weights if None.
            largest: the largest magnitude of the whole matrix, where ``needs_largest``.
        """


class FittedFormat(Format):
    """A format whose codes GPTQ may choose by calibration text."""

    def step(self, parts: Encoded) -> "Tensor":
        """The value of code 1 in each block, float32 [rows, blocks]."""
        return parts[SCALES].float()

    @abstractmethod
    def nearest(self, steps: "Tensor") -> "Tensor":
        """The codes that are nearest to numbers of steps, as float32. May change its argument."""
