"""NVFP4: 4-bit floats (E2M1), a float8 scale per group of 16, and one more scale per matrix.

Twice a 4-bit float is an integer of magnitude <= 12. So int8 numbers with halved scales represent the same values.
"""

from collections.abc import Callable
from dataclasses import dataclass

from glm4_exporters.sources.base import (
    FP8,
    UINT8,
    QuantizedMatrix,
    Read,
    Rows,
    Storage,
    require,
    require_finite,
)
from glm4_runtime.bundle.safetensors_file import TensorHeader
from glm4_runtime.errors import CheckpointError

GROUP = 16
DOUBLED = (
    0,
    1,
    2,
    3,
    4,
    6,
    8,
    12,
)  # of the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; the fourth bit is the sign


@dataclass(frozen=True)
class Nvfp4Matrix(QuantizedMatrix):
    """
    Attributes:
        packed, total: suffixes of the tensor of numbers and of the matrix's scale.
        divides: whether group scales are divided by the matrix's scale. False: multiplied.
    """

    packed: str
    total: str
    divides: bool

    def load(self, read: Read) -> "Callable[[int, int], Rows]":
        import torch

        packed, header = read(self.tensors[self.packed]), self.tensors["weight_scale"]
        blocks = require_finite(header, read(header))
        total = require_finite(self.tensors[self.total], read(self.tensors[self.total])).float().reshape(())
        if self.divides and float(total) == 0:
            raise CheckpointError(
                f"{header.file}: {self.module}.{self.total} is 0; the checkpoint is damaged"
            )
        scales = (blocks.float() / total if self.divides else blocks.float() * total) / 2
        half = (1 / total if self.divides else total) / 2
        table = torch.tensor([*DOUBLED, *(-number for number in DOUBLED)], dtype=torch.int8)

        def rows(first: int, count: int) -> Rows:
            pairs = packed[first : first + count]
            places = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)
            part = slice(first, first + count)
            return Rows(table[places.int()], scales[part], levels=(blocks[part], half))

        return rows


def nvfp4_matrix(
    module: str,
    shape: tuple[int, int],
    tensors: dict[str, TensorHeader],
    packed: str,
    total: str,
    *,
    divides: bool,
) -> Nvfp4Matrix:
    """An NVFP4 matrix, after a check of its tensors.

    Raises:
        CheckpointError: a tensor has a wrong type or shape.
    """
    rows, width = shape
    require(tensors[packed], f"{module}.{packed}", (UINT8,), (rows, width // 2))
    require(tensors.get("weight_scale"), f"{module}.weight_scale", (FP8,), (rows, width // GROUP))
    require(tensors.get(total), f"{module}.{total}", ("float32",), (), (1,))
    if width % GROUP:
        raise CheckpointError(f"{module} has {width} inputs per row, no multiple of {GROUP}")
    return Nvfp4Matrix(
        module, rows, width, Storage("float4", 4, GROUP, False, "float8 x float32"), tensors, packed, total, divides
    )  # fmt: skip
