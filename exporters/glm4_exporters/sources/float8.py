"""Float8 matrices with one scale per matrix, per row, or per block of rows and inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm4_exporters.sources.base import (
    FLOATS,
    FP8,
    QuantizedMatrix,
    Read,
    Rows,
    Storage,
    require,
    require_finite,
)
from glm4_runtime.bundle.safetensors_file import TensorHeader
from glm4_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScaledMatrix(QuantizedMatrix):
    """``weight`` [rows, width] of float8_e4m3fn or int8, multiplied by the tensor ``scale``."""

    scale: str

    def load(self, read: Read) -> "Callable[[int, int], Rows]":
        numbers = read(self.tensors["weight"])
        scales = self._scales(read)
        zeros = read(self.tensors["weight_zero_point"]).view(-1, 1) if self.storage.zeros else None
        groups = self._groups()

        def rows(first: int, count: int) -> Rows:
            some = slice(first, first + count)
            own = None if zeros is None else zeros.expand(self.rows, 1)[some]
            return Rows(numbers[some], scales[self._owners(some)], own, groups)

        return rows

    def _scales(self, read: Read) -> "Tensor":
        """[rows or blocks of rows, groups]."""
        header = self.tensors[self.scale]
        scales = require_finite(header, read(header))
        return scales if scales.dim() == 2 else scales.reshape(-1, 1)

    def _owners(self, some: slice) -> "Tensor":
        """For each row of the matrix, the row of the scales that applies."""
        import torch

        rows = torch.arange(some.start, some.stop)
        return rows // (self.storage.rows or self.rows)

    def _groups(self) -> "Tensor | None":
        import torch

        group = self.storage.group
        if group is None or self.width % group == 0:
            return None
        return torch.arange(self.width) // group  # the last block is shorter


def float8_matrix(
    module: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader], scale: str
) -> ScaledMatrix:
    """A float8 matrix with one scale, or one per row. The shape of the tensor ``scale`` decides.

    Raises:
        CheckpointError: a tensor has a wrong type or shape.
    """
    rows, width = shape
    require(tensors["weight"], f"{module}.weight", (FP8,), shape)
    header = tensors[scale]
    if header.shape in ((), (1,), (1, 1)):
        group, together = None, None
    elif header.shape in ((rows,), (rows, 1)):
        group, together = None, 1
    else:
        raise CheckpointError(
            f"{header.file}: {header.name} is {list(header.shape)}, neither one scale nor one for each of {rows} rows; "
            "the file and its quantization_config disagree, quantize the model again"
        )
    require(header, header.name, FLOATS)
    return ScaledMatrix(
        module, rows, width, Storage("float8", 8, group, False, header.dtype, together),
        owned(tensors, "weight", scale), scale,
    )  # fmt: skip


def float8_blocks(
    module: str,
    shape: tuple[int, int],
    tensors: Mapping[str, TensorHeader],
    scale: str,
    block: tuple[int, int],
) -> ScaledMatrix:
    """A float8 matrix with one scale per block [rows, inputs]. The last blocks may be smaller.

    Raises:
        CheckpointError: a tensor has a wrong type or shape.
    """
    (rows, width), (high, wide) = shape, block
    require(tensors["weight"], f"{module}.weight", (FP8,), shape)
    header = require(tensors.get(scale), f"{module}.{scale}", FLOATS, (-(-rows // high), -(-width // wide)))
    storage = Storage("float8", 8, wide, False, header.dtype, high)
    return ScaledMatrix(module, rows, width, storage, owned(tensors, "weight", scale), scale)


def owned(tensors: Mapping[str, TensorHeader], *suffixes: str) -> dict[str, TensorHeader]:
    """The module's tensors with these suffixes, and its ``input_scale``, as far as present."""
    wanted = (*suffixes, "input_scale")
    return {suffix: tensors[suffix] for suffix in wanted if suffix in tensors}
