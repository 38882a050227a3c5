"""What every source format says of itself: which tensors hold a matrix, and what their numbers mean. Needs no torch.

A source format is how another tool stores a quantized matrix in a checkpoint. All of them come down to :class:`Rows`:

    value[row, input] = (numbers[row, input] - zeros[row, group]) * scales[row, group]
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from glm4_exporters.config import DTYPES
from glm4_exporters.safetensors_file import TensorHeader
from glm4_runtime.errors import CheckpointError, shown

if TYPE_CHECKING:
    from torch import Tensor

FP8, INT8, INT32, UINT8 = "F8_E4M3", "I8", "I32", "U8"

Read = Callable[[TensorHeader], "Tensor"]  # a stored tensor, whole


@dataclass(frozen=True)
class Storage:
    """How a matrix is stored.

    Attributes:
        kind: ``int``, ``float8`` or ``float4``.
        bits: of one number.
        group: inputs of a row under one scale; None: all of a row.
        zeros: whether a group has a zero point.
        scales: element type.
        rows: rows under one scale; None: all of the matrix.
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
    """Some rows of a matrix as they are stored.

    Attributes:
        numbers: [rows, width]: int8 (integers around zero, unsigned ones less half of their range), float8_e4m3fn,
            or int8 of twice a 4-bit float's value, whose scales are then halved.
        scales: [rows, groups], finite.
        zeros: int8 [rows, groups], less the same half; None where all are 0.
        groups: int64 [width], the group of each input; None where groups lie one after the other.
    """

    numbers: "Tensor"
    scales: "Tensor"
    zeros: "Tensor | None" = None
    groups: "Tensor | None" = None

    def values(self) -> "Tensor":
        """float32 [rows, width]."""
        values = self.numbers.float()
        if self.zeros is not None:
            values -= self._spread(self.zeros.float())
        return values.mul_(self._spread(self.scales.float()))

    def _spread(self, by_group: "Tensor") -> "Tensor":
        """[rows, groups] -> [rows, width], or [rows, 1]."""
        width, count = self.numbers.shape[1], by_group.shape[1]
        if self.groups is not None:
            return by_group[:, self.groups]
        return by_group if count == 1 else by_group.repeat_interleave(width // count, 1)


@dataclass(frozen=True)
class QuantizedMatrix(ABC):
    """A matrix [rows, width] that the checkpoint stores as several tensors.

    Attributes:
        module: its name without ``.weight``.
        tensors: its stored tensors, by what follows the module's name.
        input_scale: of a fixed rounding of its input, where the checkpoint brings one.
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
        """Of all its stored tensors."""
        return sum(header.nbytes for header in self.tensors.values())

    def in_order(self, read: Read) -> bool:
        """Whether the groups of inputs lie one after the other; reads no other tensor than the groups'."""
        import torch

        header = self.tensors.get("g_idx", self.tensors.get("weight_g_idx"))
        if header is None:
            return True
        return torch.equal(
            read(header).long(), torch.arange(self.width) // (self.storage.group or self.width)
        )

    @abstractmethod
    def load(self, read: Read) -> "Callable[[int, int], Rows]":
        """Read the stored tensors whole; the result gives ``count`` rows from row ``first`` on.

        Raises:
            CheckpointError: the tensors hold what the format does not allow.
        """


class SourceFormat(ABC):
    """How one tool stores quantized matrices, with the settings of one checkpoint.

    Attributes:
        name: of the tool or its format, for people.
        suffixes: what follows a module's name in the names of its tensors, ``weight`` excepted.
        left: names or patterns of modules that the checkpoint leaves as they are, by its configuration.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    left: tuple[str, ...] = ()

    @abstractmethod
    def matrix(
        self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader]
    ) -> QuantizedMatrix | None:
        """The matrix of a module with these tensors; None where it is not quantized.

        Raises:
            CheckpointError: the tensors are not what the format stores for a matrix of this shape.
        """


@dataclass(frozen=True)
class Settings:
    """An object of a quantization's configuration, read strictly.

    Raises:
        CheckpointError: a value is not of the type that is asked for.
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
        """Of the first key that is there."""
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
        """The value of a key, which must be one of a few."""
        found = self.values.get(key)
        found = default if found is None else found
        if not any(type(found) is type(value) and found == value for value in allowed):
            known = ", ".join(shown(value) for value in allowed)
            raise self.refuse(f"{key} is {shown(found)}; what is read is {known}")
        return found

    def refuse(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.place}: {why}; {ORIGINAL}")

    def _typed(self, key: str, kind: type, wanted: str, default: Any) -> Any:
        found = self.values.get(key)
        if found is None:
            return default
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise self.refuse(f"{key} is {shown(found)}, but must be {wanted}")
        return found


ORIGINAL = "give the original checkpoint, which export can quantize itself"


def require(
    header: TensorHeader | None, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]
) -> TensorHeader:
    """The header of a tensor that must be there, with one of these types and shapes.

    Raises:
        CheckpointError: it is not.
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
    """Scales that are all finite.

    Raises:
        CheckpointError: one is NaN or infinite.
    """
    if not bool(scales.float().isfinite().all()):
        raise CheckpointError(
            f"{header.file}: {header.name} holds NaN or infinity; the checkpoint is damaged"
        )
    return scales


def groups_of(width: int, group: int | None, module: str) -> int:
    """How many groups a row has.

    Raises:
        CheckpointError: the group does not divide the width.
    """
    if group is None:
        return 1
    if group < 1 or width % group:
        raise CheckpointError(
            f"{module} has {width} inputs per row, which groups of {group} do not divide; {ORIGINAL}"
        )
    return width // group


FLOATS = DTYPES
