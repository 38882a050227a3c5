"""GPTQ's layout, as gptqmodel and AutoGPTQ write it: numbers packed along the inputs.

With 4 bits: ``qweight`` int32 [width / 8, rows], ``scales`` [groups, rows], ``qzeros`` int32 [groups, rows / 8], and
``g_idx`` int32 [width]. With 8 bits, / 8 becomes / 4. The first version of the layout stores each zero point minus 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class GptqMatrix(QuantizedMatrix):
    """
    Attributes:
        offset: added to each stored zero point, 1 or 0.
    """

    offset: int = 0

    def load(self, read: Read) -> "Callable[[int, int], Rows]":
        from glm4_exporters.sources.bits import around_zero, plus_one, unpack

        bits = self.storage.bits
        packed = read(self.tensors["qweight"]).t()  # [rows, width / 8]
        scales = require_finite(self.tensors["scales"], read(self.tensors["scales"])).t()
        stored = read(self.tensors["qzeros"])
        zeros = around_zero(unpack(plus_one(stored, bits) if self.offset else stored, bits), bits).t()
        plain = not self.storage.zeros
        if plain and bool(zeros[: self.rows].any()):
            raise CheckpointError(
                f"{self.tensors['qzeros'].file}: {self.module}.qzeros is not the middle everywhere, but "
                f"quantization_config says sym true; {TAKE_ORIGINAL}"
            )
        groups = self._groups(read)

        def rows(first: int, count: int) -> Rows:
            some = slice(first, first + count)
            numbers = around_zero(unpack(packed[some], bits), bits)
            return Rows(numbers, scales[some], None if plain else zeros[some], groups)

        return rows

    def _groups(self, read: Read) -> "Tensor | None":
        """The group of each input, int64 [width]. None: groups are contiguous."""
        import torch

        if "g_idx" not in self.tensors:
            return None
        size = self.storage.group or self.width
        count, found = self.width // size, read(self.tensors["g_idx"]).long()
        if bool((found < 0).any()) or bool((found >= count).any()):
            raise CheckpointError(
                f"{self.tensors['g_idx'].file}: {self.module}.g_idx names groups beyond 0 ... {count - 1}; "
                "the checkpoint is damaged"
            )
        return None if torch.equal(found, torch.arange(self.width) // size) else found


class Gptq(SourceFormat):
    name = "GPTQ"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, settings: Settings) -> None:
        self.bits: int = settings.one_of("bits", (4, 8), None)
        group = settings.integer("group_size", WHOLE_ROW)
        self.group = None if group == WHOLE_ROW else group
        self.symmetric = settings.boolean("sym", True)
        layout: str = settings.one_of("checkpoint_format", CHECKPOINT_FORMATS, None) if settings.text(
            "checkpoint_format"
        ) else settings.one_of("format", CHECKPOINT_FORMATS, CHECKPOINT_FORMATS[0])  # fmt: skip
        self.offset = int(layout == CHECKPOINT_FORMATS[0])
        if settings.section("dynamic") is not None:
            raise settings.refuse("dynamic gives modules bits and groups of their own, which is not read")

    def matrix(
        self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader]
    ) -> GptqMatrix | None:
        if "qweight" not in tensors:
            return None
        (rows, width), per_word = shape, 32 // self.bits
        groups = groups_of(width, self.group, module)
        if width % per_word or rows % per_word:
            raise CheckpointError(
                f"{module} [{rows}, {width}] is no multiple of {per_word}, by which GPTQ packs; {TAKE_ORIGINAL}"
            )
        require(tensors["qweight"], f"{module}.qweight", (INT32,), (width // per_word, rows))
        scales = require(tensors.get("scales"), f"{module}.scales", FLOATS, (groups, rows))
        require(tensors.get("qzeros"), f"{module}.qzeros", (INT32,), (groups, rows // per_word))
        if "g_idx" in tensors:
            require(tensors["g_idx"], f"{module}.g_idx", (INT32,), (width,))
        storage = Storage("int", self.bits, self.group, not self.symmetric, scales.dtype)
        own = {suffix: tensors[suffix] for suffix in self.suffixes if suffix in tensors}
        return GptqMatrix(module, rows, width, storage, own, self.offset)
