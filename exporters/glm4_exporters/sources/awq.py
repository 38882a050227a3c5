"""AWQ with the GEMM layout, as AutoAWQ writes it: 4-bit numbers, eight rows packed into an int32 in ``AWQ_ORDER``.
``qweight`` int32 [width, rows / 8], ``qzeros`` int32 [groups, rows / 8], ``scales`` [groups, rows].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from glm4_exporters.sources.base import (
    FLOATS,
    INT32,
    TAKE_ORIGINAL,
    WHOLE_ROW,
    QuantizedMatrix,
    Read,
    Rows,
    Settings,
    SourceFormat,
    Storage,
    groups_of,
    require,
    require_finite,
)
from glm4_runtime.bundle.safetensors_file import TensorHeader
from glm4_runtime.errors import CheckpointError

BITS, PER_WORD = 4, 8


@dataclass(frozen=True)
class AwqMatrix(QuantizedMatrix):
    def load(self, read: Read) -> "Callable[[int, int], Rows]":
        from glm4_exporters.sources.bits import AWQ_ORDER, around_zero, unpack

        packed = read(self.tensors["qweight"])
        scales = require_finite(self.tensors["scales"], read(self.tensors["scales"])).t()
        zeros = None
        if "qzeros" in self.tensors:
            zeros = around_zero(unpack(read(self.tensors["qzeros"]), BITS, AWQ_ORDER), BITS).t()

        def rows(first: int, count: int) -> Rows:
            start, end = first // PER_WORD, -(-(first + count) // PER_WORD)
            unpacked = unpack(packed[:, start:end], BITS, AWQ_ORDER)
            shift = first - start * PER_WORD
            numbers = around_zero(unpacked[:, shift : shift + count], BITS).t().contiguous()
            some = slice(first, first + count)
            return Rows(numbers, scales[some], None if zeros is None else zeros[some])

        return rows


class Awq(SourceFormat):
    name = "AWQ"
    suffixes = ("qweight", "qzeros", "scales")

    def __init__(self, settings: Settings) -> None:
        bits = settings.integer("bits", settings.integer("w_bit"))
        if bits != BITS:
            raise settings.refuse(f"bits is {bits}; AWQ is read with 4")
        group = settings.integer("group_size", settings.integer("q_group_size", WHOLE_ROW))
        self.group = None if group == WHOLE_ROW else group
        self.zeros = settings.boolean("zero_point", True)
        layout = (settings.text("version") or settings.text("format") or "gemm").lower()
        if layout != "gemm":
            raise settings.refuse(f"version is {layout!r}; AWQ is read in the order 'gemm'")

    def matrix(
        self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader]
    ) -> AwqMatrix | None:
        if "qweight" not in tensors:
            return None
        rows, width = shape
        groups = groups_of(width, self.group, module)
        if rows % PER_WORD:
            raise CheckpointError(
                f"{module} has {rows} rows, no multiple of 8, by which AWQ packs; {TAKE_ORIGINAL}"
            )
        require(tensors["qweight"], f"{module}.qweight", (INT32,), (width, rows // PER_WORD))
        scales = require(tensors.get("scales"), f"{module}.scales", FLOATS, (groups, rows))
        if self.zeros or "qzeros" in tensors:
            require(tensors.get("qzeros"), f"{module}.qzeros", (INT32,), (groups, rows // PER_WORD))
        storage = Storage("int", BITS, self.group, "qzeros" in tensors, scales.dtype)
        own = {suffix: tensors[suffix] for suffix in self.suffixes if suffix in tensors}
        return AwqMatrix(module, rows, width, storage, own)
