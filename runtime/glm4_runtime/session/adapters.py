"""The LoRA adapters that a session has loaded, and the arrays that its graph reads."""

import abc
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_runtime.adapters.arrays import AdapterPart, read_parts
from glm4_runtime.bundle import AdapterSlots, Manifest
from glm4_runtime.bundle.adapter_inputs import (
    ENTRY,
    PACKED_DIALECT,
    PARTS,
    PLACES,
    packed_name,
    stacked_names,
)
from glm4_runtime.errors import CheckpointError, RequestError, some

Arrays = dict[str, npt.NDArray[Any]]
PANEL = 64  # columns of B that are stored together, for glm4::LoraProduct


class AdapterTable(abc.ABC):
    """Adapters by name.

    Attributes:
        arrays: the graph's inputs, except ``adapter_rows``. Both methods that change them may replace arrays.
        digests: SHA-256 of the matrices of each loaded adapter.
    """

    none: int  # in ``adapter_rows``, for a sequence without an adapter

    def __init__(self, manifest: Manifest, slots: AdapterSlots) -> None:
        self._manifest, self._slots = manifest, slots
        self.arrays: Arrays = {}
        self.digests: dict[str, str] = {}

    @property
    @abc.abstractmethod
    def names(self) -> Sequence[str]:
        """The loaded adapters."""

    @abc.abstractmethod
    def number(self, name: str) -> int:
        """The number of a loaded adapter in ``adapter_rows``."""

    @abc.abstractmethod
    def _add(self, name: str, parts: Iterable[AdapterPart]) -> None:
        """Add an adapter. If reading fails, nothing has changed."""

    @abc.abstractmethod
    def unload(self, name: str) -> None:
        """Remove a loaded adapter."""

    def load(self, name: str, folder: Path) -> None:
        """Read an adapter.

        Raises:
            RequestError: the name is taken, or all slots are. CheckpointError: the adapter does not fit.
        """
        if not name:
            raise RequestError("the adapter's name is empty; give it a name")
        if name in self.names:
            raise RequestError(
                f"an adapter {name!r} is loaded already; unload it first, or give another name"
            )
        if len(self.names) >= self._slots.count:
            raise RequestError(
                f"all {self._slots.count} adapter slots of this bundle are in use ({some(self.names)}); unload one first, "
                "or export with a higher --lora-slots"
            )
        digest = hashlib.sha256()
        try:
            self._add(name, _hashed(read_parts(folder, self._manifest, self._slots), digest))
        except MemoryError as error:
            raise CheckpointError(
                f"there is no memory for the adapter {folder}; unload another one"
            ) from error
        self.digests[name] = digest.hexdigest()

    def numbers(self, names: Iterable[str | None]) -> npt.NDArray[np.int64]:
        """``adapter_rows`` for sequences with these adapters."""
        return np.array([self.none if name is None else self.number(name) for name in names], np.int64)

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())


class PackedAdapters(AdapterTable):
    """One array for each adapter, and the table of places: see :mod:`glm4_plugins.lora_product`."""

    none = -1

    def __init__(self, manifest: Manifest, slots: AdapterSlots) -> None:
        super().__init__(manifest, slots)
        self._held: list[str | None] = [None] * slots.count
        self._matrices = {name: place for place, name in enumerate(sorted(slots.matrices))}
        self._places = np.zeros((slots.count, len(slots.matrices), PARTS, ENTRY), np.int64)
        self.arrays = {PLACES: self._places}
        for slot in range(slots.count):
            self._clear(slot)

    @property
    def names(self) -> Sequence[str]:
        return [name for name in self._held if name is not None]

    def number(self, name: str) -> int:
        return self._held.index(name)

    def _add(self, name: str, parts: Iterable[AdapterPart]) -> None:
        slot = self._held.index(None)
        places, pieces, position = np.zeros_like(self._places[slot]), [], 0
        for part in parts:
            (inputs, rank), panels = part.right.shape, _panels(part)
            entries = places[self._matrices[part.matrix]]
            after = position + inputs * rank
            entries[int(entries[0, 0] != 0)] = rank, position, after, part.first // PANEL, len(panels)
            pieces += [part.right.reshape(-1), panels.reshape(-1)]
            position = after + panels.size
        self.arrays[packed_name(slot)] = np.concatenate(pieces)
        self._places[slot] = places
        self._held[slot] = name

    def unload(self, name: str) -> None:
        self._clear(self.number(name))

    def _clear(self, slot: int) -> None:
        self._held[slot], self._places[slot] = None, 0
        self.arrays[packed_name(slot)] = np.zeros(1, np.float16)


class StackedAdapters(AdapterTable):
    """Two arrays for each matrix of the model, over all adapters: A [1 + adapters, inputs, rank] and B [1 + adapters,
    rank, outputs]. Adapter 0 is zero. The rank of a matrix is the largest among the adapters."""

    none = 0

    def __init__(self, manifest: Manifest, slots: AdapterSlots) -> None:
        super().__init__(manifest, slots)
        self._held: list[str] = []
        for matrix, (outputs, inputs) in slots.matrices.items():
            right, left = stacked_names(matrix)
            self.arrays[right] = np.zeros((1, inputs, 1), np.float16)
            self.arrays[left] = np.zeros((1, 1, outputs), np.float16)

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._held)

    def number(self, name: str) -> int:
        return 1 + self._held.index(name)

    def _add(self, name: str, parts: Iterable[AdapterPart]) -> None:
        read: dict[str, list[AdapterPart]] = {}
        for part in parts:  # all are read before the first array changes
            read.setdefault(part.matrix, []).append(part)
        try:
            for matrix, (outputs, inputs) in self._slots.matrices.items():
                added = _joined(read.pop(matrix, []), inputs, outputs)
                for key, array in zip(stacked_names(matrix), added, strict=True):
                    self.arrays[key] = _stacked([*self.arrays[key], array])
        except BaseException:
            self.arrays = {key: array[: 1 + len(self._held)] for key, array in self.arrays.items()}
            raise
        self._held.append(name)

    def unload(self, name: str) -> None:
        number = self.number(name)
        for matrix in self._slots.matrices:
            keys = stacked_names(matrix)
            rest = {key: np.delete(self.arrays[key], number, axis=0) for key in keys}
            right, left = (rest[key] for key in keys)
            used = max(1, *(int(np.flatnonzero(one.any(axis=1)).max(initial=-1)) + 1 for one in left))
            self.arrays |= {keys[0]: right[:, :, :used].copy(), keys[1]: left[:, :used].copy()}
        self._held.remove(name)


def _hashed(parts: Iterable[AdapterPart], digest: "hashlib._Hash") -> Iterator[AdapterPart]:
    """The parts, of which each is added to ``digest``."""
    for part in parts:
        for array in (part.right, part.left):
            digest.update(repr((part.matrix, part.first, array.shape)).encode())
            digest.update(array.tobytes())
        yield part


def make_table(manifest: Manifest, slots: AdapterSlots) -> AdapterTable:
    """An empty table in the form that the bundle's graph takes."""
    kind = PackedAdapters if manifest.dialect == PACKED_DIALECT else StackedAdapters
    return kind(manifest, slots)


def _panels(part: AdapterPart) -> npt.NDArray[np.float16]:
    """B [r, rows] as panels [panels, r, 64] that begin at a multiple of 64 columns, with zeros around the part."""
    rank, rows = part.left.shape
    before = part.first % PANEL
    wide = np.zeros((rank, -(-(before + rows) // PANEL) * PANEL), np.float16)
    wide[:, before : before + rows] = part.left
    return np.ascontiguousarray(wide.reshape(rank, -1, PANEL).swapaxes(0, 1))


def _joined(
    parts: Sequence[AdapterPart], inputs: int, outputs: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """A [inputs, r] and B [r, outputs] of a matrix. Parts for some rows each, such as gate and up, lie side by side."""
    rank = sum(part.right.shape[1] for part in parts)
    right, left = np.zeros((inputs, rank), np.float16), np.zeros((rank, outputs), np.float16)
    at = 0
    for part in parts:
        own = slice(at, at + part.right.shape[1])
        right[:, own], left[own, part.first : part.first + part.left.shape[1]] = part.right, part.left
        at = own.stop
    return right, left


def _stacked(matrices: Sequence[npt.NDArray[np.float16]]) -> npt.NDArray[np.float16]:
    """Matrices of unequal sizes in one array, padded with zeros."""
    sizes: Mapping[int, int] = {axis: max(each.shape[axis] for each in matrices) for axis in (0, 1)}
    stack = np.zeros((len(matrices), sizes[0], sizes[1]), np.float16)
    for place, each in enumerate(matrices):
        stack[place, : each.shape[0], : each.shape[1]] = each
    return stack
