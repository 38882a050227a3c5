"""Schemes: how the numbers of a matrix are stored, as rows of one table. Needs no torch."""

from dataclasses import dataclass

from glm4_runtime.errors import ExportError

# How the numbers of a matrix lie in a file: with their zero in the middle, in two's complement, or with their zero in the
# middle and in the panels of ``glm4::BlockQuantizedMatMul``.
UNSIGNED, SIGNED, PANELS = "unsigned", "signed", "panels"


@dataclass(frozen=True)
class Scheme:
    """Integers around zero under one scale per block of consecutive inputs of a row.

    Attributes:
        bits: of a stored number; 4-bit numbers lie two in a byte, the first in the low half.
        block: numbers under one scale; a row whose width is no multiple of it ends in a shorter block. None
            for one scale per row.
        ranges: shares of the block's largest |w| at which the largest number may stand. The one that
            leaves the least squared error is kept; with one share, only the refit remains.
        inputs: whether what the matrix reads is rounded to 8 bits too, under one scale found on calibration
            text, so that the product is one of integers.
        signed_scales: whether a scale may be negative, so that the block's largest |w| can always stand at the
            smallest number, which is one step farther out. Else scales are positive, as TensorRT wants them.
    """

    bits: int
    block: int | None
    ranges: tuple[float, ...]
    inputs: bool = False
    signed_scales: bool = False

    @property
    def largest(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def smallest(self) -> int:
        """In 4 bits the eighth negative number is worth having; in 8 the range is kept symmetric."""
        return -self.largest - (self.bits < 8)

    @property
    def zero(self) -> int:
        """What stands for 0 where the numbers are stored unsigned."""
        return 1 << self.bits - 1

    def blocks(self, width: int) -> int:
        """Blocks of a row of ``width`` numbers."""
        return 1 if self.block is None else -(-width // self.block)

    def bits_per_weight(self, scale_bits: int = 16) -> float:
        """Of long rows, scales counted."""
        return self.bits + (0 if self.block is None else scale_bits / self.block)

    def stored_width(self, width: int) -> int:
        """Numbers of a row in whole blocks."""
        return width if self.block is None else self.blocks(width) * self.block


# int8's error is a rounding that a search cannot lower; int4's is, by what it clips.
SCHEMES = {
    "int8": Scheme(bits=8, block=128, ranges=(1.0,)),
    "int8-channel": Scheme(bits=8, block=None, ranges=(1.0, 0.9)),
    "int8-sq": Scheme(bits=8, block=None, ranges=(1.0, 0.9), inputs=True),
    "int4": Scheme(bits=4, block=32, ranges=(0.95, 0.8)),
    "int4-fine": Scheme(bits=4, block=16, ranges=(0.95, 0.8)),
    "int4-wide": Scheme(bits=4, block=64, ranges=(0.95, 0.8)),
    "int4-signed": Scheme(bits=4, block=32, ranges=(1.0, 0.85), signed_scales=True),
    "int4-fine-signed": Scheme(bits=4, block=16, ranges=(1.0, 0.85), signed_scales=True),
    "int4-wide-signed": Scheme(bits=4, block=64, ranges=(1.0, 0.85), signed_scales=True),
}


def require_scheme(name: str) -> Scheme:
    """The row of the table.

    Raises:
        ExportError: an unknown name; lists the known ones.
    """
    if name not in SCHEMES:
        raise ExportError(f"unknown scheme {name!r}; the schemes are {', '.join(SCHEMES)}")
    return SCHEMES[name]
