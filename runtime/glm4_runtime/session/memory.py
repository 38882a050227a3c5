"""The memory of a KV cache: one block [rows, Hkv, C, width] per layer for keys and one for values, on any device.

The width is the head size, and the bytes of a row's scale where rows have one (``CACHE_TYPES``).
"""

import abc
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_runtime.bundle import Manifest
from glm4_runtime.bundle.element_types import CACHE_TYPES, NUMPY_LACKS, bits
from glm4_runtime.kv_cache import Move


class CacheLayout:
    """Names and sizes of every block, with the past and the present that it is bound to.

    Args:
        layers: the layers that have blocks. None: all.
    """

    def __init__(self, manifest: Manifest, rows: int, layers: range | None = None) -> None:
        self.rows, model = rows, manifest.model
        stored = CACHE_TYPES[str(manifest.kv_cache)]
        self.heads, self.width = model.num_kv_heads, stored.row(model.head_dim)
        # As an I/O binding takes the type: NumPy's, or ONNX's number.
        self.element: Any = NUMPY_LACKS.get(stored.element) or np.dtype(stored.element)
        self.item = bits(stored.element) // 8
        self.names = [
            (f"past_key_values.{i}.{side}", f"present_key_values.{i}.{side}")
            for i in layers or range(model.num_layers)
            for side in ("key", "value")
        ]


class CacheMemory(CacheLayout, abc.ABC):
    """The interface between a session and the memory of its cache."""

    @abc.abstractmethod
    def resize(self, capacity: int, used: int) -> None:
        """Change the capacity of every row; the first ``used`` positions keep their contents."""

    @abc.abstractmethod
    def move(self, move: Move) -> None:
        """Copy or swap two rows of every block. If it raises MemoryError, no block has changed."""

    @abc.abstractmethod
    def clear(self, row: int) -> None:
        """Set a row of every block to zeros."""

    @abc.abstractmethod
    def views(self, first_row: int, count: int) -> list[tuple[str, str, Any, tuple[int, ...], int]]:
        """For each block's rows: name of the past, name of the present, element type, shape and address."""

    @abc.abstractmethod
    def free(self) -> None:
        """Free the memory."""


class HostMemory(CacheMemory):
    """NumPy arrays."""

    def __init__(self, manifest: Manifest, rows: int, layers: range | None = None) -> None:
        super().__init__(manifest, rows, layers)
        self.dtype = np.dtype(CACHE_TYPES[str(manifest.kv_cache)].numpy)
        self.arrays = [self._new(0) for _ in self.names]

    def _new(self, capacity: int) -> npt.NDArray[Any]:
        # Zeros, because native attention multiplies memory beyond the end by zero, and zero times NaN is not zero.
        # Untouched pages cost nothing.
        return np.zeros((self.rows, self.heads, capacity, self.width), self.dtype)

    def resize(self, capacity: int, used: int) -> None:
        # All or none: reserving uses no memory yet, but already fails if there is too little.
        blocks = [self._new(capacity) for _ in self.arrays]
        for i, new in enumerate(blocks):
            new[:, :, :used] = self.arrays[i][:, :, :used]
            self.arrays[i] = (
                new  # one block at a time, so that old and new cache are never in memory together
            )

    def move(self, move: Move) -> None:
        # Allocated before anything moves: if there is no memory, both rows stay unchanged.
        outgoing = np.empty((self.heads, move.swapped_length, self.width), self.dtype)
        for array in self.arrays:
            outgoing[...] = array[move.target, :, : move.swapped_length]
            array[move.target, :, : move.length] = array[move.source, :, : move.length]
            array[move.source, :, : move.swapped_length] = outgoing

    def clear(self, row: int) -> None:
        for array in self.arrays:
            array[row] = 0

    def read(self, row: int, start: int, stop: int) -> npt.NDArray[Any]:
        """A copy of positions ``start`` ... ``stop`` - 1 of a row: [2 * layers, Hkv, positions, width]."""
        return np.stack([array[row, :, start:stop] for array in self.arrays])

    def write(self, row: int, start: int, block: npt.NDArray[Any]) -> None:
        """Store what :meth:`read` gave, from position ``start`` on."""
        for array, part in zip(self.arrays, block, strict=True):
            array[row, :, start : start + block.shape[2]] = part

    def views(self, first_row: int, count: int) -> list[tuple[str, str, Any, tuple[int, ...], int]]:
        rows = [array[first_row : first_row + count] for array in self.arrays]
        return [
            (past, present, self.element, view.shape, view.ctypes.data)
            for (past, present), view in zip(self.names, rows, strict=True)
        ]

    def free(self) -> None:
        self.arrays = []
