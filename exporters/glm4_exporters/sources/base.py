"""Interfaces of a source format: the tensors of a quantized matrix, and the meaning of their numbers. Needs no torch.

A source format is another tool's way to store a quantized matrix. Every format is converted to :class:`Rows`:

    value[row, input] = (numbers[row, input] - zeros[row, group]) * scales[row, group]
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glm4_exporters.config import DTYPES
from glm4_runtime.bundle.safetensors_file import TensorHeader
from glm4_runtime.errors import CheckpointError, shown

if TYPE_CHECKING:
    from torch import Tensor

FP8, INT8, INT32, UINT8 = "F8_E4M3", "I8", "I32", "U8"  # safetensors' names
LARGEST_NUMBER = 512  # float8's numbers, and 8-bit numbers minus zero points, are smaller in magnitude
WHOLE_ROW = -1  # a group size: one group for a whole row

Read = Callable[[TensorHeader], "Tensor"]  # reads a whole stored tensor


@dataclass(frozen=True)
class Storage:
    """The storage of a quantized matrix.

    Attributes:
        kind: ``int``, ``float8`` or ``float4``.
        bits: bits of one number.
        group: number of inputs that share a scale. None: all inputs of a row.
        zeros: whether each group has a zero point.
        scales: element type of the scales.
        rows: number of rows that share a scale. None: all rows.
    """

    kind: str
    bits: int
    group: int | None
    zeros: bool
    scales: str
    rows: int | None = 1

    def __str__(self) -> str:
        name = f"int{self.bits}" if self.kind == "int" else {"float8": "fp8", "float4": "nvfp4"}[self.kind]
        per_row = "a scale per row" if self.rows == 1 else "a scale per matrix"
        size = per_row if self.group is None else f"groups of {self.group}"
        if self.group is not None and self.rows != 1:
            size = f"blocks of {self.rows} x {self.group}"
        return f"{name}, {size}{', zero points' if self.zeros else ''}, {self.scales} scales"


@dataclass(frozen=True)
class Rows:
    """Some rows of a quantized matrix.

    Attributes:
        numbers: [rows, width], int8 or float8_e4m3fn. Unsigned integers are shifted by half of their range. A 4-bit
            float is stored as int8 with twice its value, and its scale is halved.
        scales: [rows, groups], finite.
        zeros: int8 [rows, groups], shifted like the numbers. None: all zero points are 0.
        groups: int64 [width], the group of each input. None: groups are contiguous.
        levels: for 4-bit floats, the two factors of ``scales``: float8 [rows, groups], and float32 [].
    """

    numbers: "Tensor"
    scales: "Tensor"
    zeros: "Tensor | None" = None
    groups: "Tensor | None" = None
    levels: "tuple[Tensor, Tensor] | None" = None

    def values(self) -> "Tensor":
        """The dequantized values, float32 [rows, width]."""
        values = self.numbers.float()
        if self.zeros is not None:
            values -= self._spread(self.zeros.float())
        return values.mul_(self._spread(self.scales.float()))

    def finite(self) -> bool:
        """Whether all values are finite. A float8 number may be NaN, and number * scale may overflow float32."""
        import torch

        if self.numbers.is_floating_point() and bool(self.numbers.isnan().any()):
            return False
        small = float(self.scales.float().abs().amax()) <= torch.finfo(torch.float32).max / LARGEST_NUMBER
        return small or bool(self.values().isfinite().all())

    def without_zeros(self) -> "Tensor":
        """The numbers minus their zero points, int8 [rows, width]: in -15 ... 15 for 4-bit numbers."""
        return self.numbers if self.zeros is None else self.numbers - self._spread(self.zeros)

    def _spread(self, by_group: "Tensor") -> "Tensor":
        """Expand [rows, groups] to [rows, width], or to [rows, 1] for a single group."""
        width, count = self.numbers.shape[1], by_group.shape[1]
        if self.groups is not None:
            return by_group[:, self.groups]
        return by_group if count == 1 else by_group.repeat_interleave(width // count, 1)


@dataclass(frozen=True)
class QuantizedMatrix(ABC):
    """A matrix [rows, width] that the checkpoint stores as several tensors.

    Attributes:
        module: the matrix's name without ``.weight``.
        tensors: headers of the stored tensors, by the suffix after the module's name.
        input_scale: the scale of static input quantization. None: the checkpoint has none.
    """

    module: str
    rows: int
    width: int
    storage: Storage
    tensors: Mapping[str, TensorHeader]

    @property
    def input_scale(self) -> TensorHeader | None:
        return self.tensors.get("input_scale")

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(header.nbytes for header in self.tensors.values())

    def in_order(self, read: Read) -> bool:
        """Whether the groups are contiguous. Reads only the tensor of group indices."""
        import torch

        header = self.tensors.get("g_idx", self.tensors.get("weight_g_idx"))
        if header is None:
            return True
        return torch.equal(
            read(header).long(), torch.arange(self.width) // (self.storage.group or self.width)
        )

    @abstractmethod
    def load(self, read: Read) -> "Callable[[int, int], Rows]":
        """Read the stored tensors, and return a function of ``first`` and ``count`` that returns these rows.

        Raises:
            CheckpointError: the tensors hold values that the format does not allow.
        """


class SourceFormat(ABC):
    """One tool's format, with the settings of one checkpoint.

    Attributes:
        name: the tool or the format, for messages.
        suffixes: suffixes of a module's tensors in this format, without ``weight``.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def matrix(
        self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader]
    ) -> QuantizedMatrix | None:
        """The quantized matrix of a module. None: the module is not quantized.

        Args:
            shape: rows and width of the matrix.
            tensors: headers of all tensors of the module, by suffix.

        Raises:
            CheckpointError: the tensors' types or shapes do not match the format and ``shape``.
        """


@dataclass(frozen=True)
class Settings:
    """A JSON object of the quantization settings, with typed access.

    Raises:
        CheckpointError: a value has another type than the called method requires.
    """

    values: Mapping[str, Any]
    place: str = "quantization_config"

    def integer(self, key: str, default: int | None = None) -> int | None:
        return self._typed(key, int, "an integer", default)  # type: ignore[no-any-return]

    def text(self, key: str, default: str | None = None) -> str | None:
        return self._typed(key, str, "a string", default)  # type: ignore[no-any-return]

    def boolean(self, key: str, default: bool) -> bool:
        return bool(self._typed(key, bool, "true or false", default))

    def names(self, *keys: str) -> tuple[str, ...]:
        """The list of names under the first key that is present. Empty: no key is present."""
        for key in keys:
            found = self.values.get(key)
            if found is None:
                continue
            if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
                raise self.refuse(f"{key} is {shown(found)}, but must be a list of names")
            return tuple(found)
        return ()

    def section(self, key: str) -> "Settings | None":
        found = self.values.get(key)
        if found is not None and not isinstance(found, dict):
            raise self.refuse(f"{key} is {shown(found)}, but must be an object or null")
        return Settings(found, f"{self.place}.{key}") if found else None

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """The value of a key, which must be one of ``allowed``."""
        found = self.values.get(key)
        found = default if found is None else found
        if not any(type(found) is type(value) and found == value for value in allowed):
            known = ", ".join(shown(value) for value in allowed)
            raise self.refuse(f"{key} is {shown(found)}; what is read is {known}")
        return found

    def refuse(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.place}: {why}; {TAKE_ORIGINAL}")

    def _typed(self, key: str, kind: type, wanted: str, default: Any) -> Any:
        found = self.values.get(key)
        if found is None:
            return default
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise self.refuse(f"{key} is {shown(found)}, but must be {wanted}")
        return found


TAKE_ORIGINAL = "give the original checkpoint, which export can quantize itself"


def require(
    header: TensorHeader | None, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]
) -> TensorHeader:
    """Return the header of a required tensor, after a check of its type and shape.

    Raises:
        CheckpointError: the tensor is missing, or its type or shape is not among the given ones.
    """
    if header is None:
        raise CheckpointError(f"the quantized matrix has no {name}; finish the download")
    if header.dtype not in dtypes or (shapes and header.shape not in shapes):
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise CheckpointError(
            f"{header.file}: {name} is {header.dtype} {list(header.shape)} instead of {' or '.join(dtypes)} {wanted}; "
            "the file and its quantization_config disagree, quantize the model again"
        )
    return header


def require_finite(header: TensorHeader, scales: "Tensor") -> "Tensor":
    """Return ``scales`` after a check.

    Raises:
        CheckpointError: a scale is NaN or infinite.
    """
    if not bool(scales.float().isfinite().all()):
        raise CheckpointError(
            f"{header.file}: {header.name} holds NaN or infinity; the checkpoint is damaged"
        )
    return scales


def groups_of(width: int, group: int | None, module: str) -> int:
    """Number of groups of a row.

    Raises:
        CheckpointError: the width is not a multiple of the group size.
    """
    if group is None:
        return 1
    if group < 1 or width % group:
        raise CheckpointError(
            f"{module} has {width} inputs per row, which groups of {group} do not divide; {TAKE_ORIGINAL}"
        )
    return width // group


FLOATS = DTYPES
