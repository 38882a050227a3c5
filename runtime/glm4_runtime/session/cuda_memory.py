"""The KV cache in GPU memory: the layout of the host's cache, moved by cudart on the session's stream."""

from typing import Any

from glm4_runtime.bundle import Manifest
from glm4_runtime.kv_cache import Move
from glm4_runtime.session.cuda_device import Cuda
from glm4_runtime.session.memory import CacheMemory


class CudaMemory(CacheMemory):
    """Every layer's keys and values as one allocation [rows, Hkv, C, D] each.

    Each block records its own capacity. If memory ends while the blocks grow, some have grown and others not, and all
    keep their contents.
    """

    def __init__(self, manifest: Manifest, rows: int, cuda: Cuda, layers: range | None = None) -> None:
        super().__init__(manifest, rows, layers)
        self._cuda = cuda
        self._pointers = [0] * len(self.names)
        self._capacities = [0] * len(self.names)
        self._spare = 0  # one row as swap space, so that a swap cannot run out of memory

    def resize(self, capacity: int, used: int) -> None:
        row_bytes = self._row_bytes(capacity)
        spare = self._cuda.allocate(self._row_bytes(max(capacity, *self._capacities)))
        self._release(self._spare)
        self._spare = spare
        for i, old in enumerate(self._pointers):
            new = self._cuda.allocate_zeroed(self.rows * row_bytes)
            if used:
                self._copy(new, capacity, old, self._capacities[i], self.rows * self.heads, used)
            self._release(old)
            self._pointers[i], self._capacities[i] = new, capacity

    def move(self, move: Move) -> None:
        for pointer, capacity in zip(self._pointers, self._capacities, strict=True):
            size = self._row_bytes(capacity)
            source, target = pointer + move.source * size, pointer + move.target * size
            if move.swapped_length:
                self._copy(self._spare, capacity, target, capacity, self.heads, move.swapped_length)
            self._copy(target, capacity, source, capacity, self.heads, move.length)
            if move.swapped_length:
                self._copy(source, capacity, self._spare, capacity, self.heads, move.swapped_length)

    def clear(self, row: int) -> None:
        for pointer, capacity in zip(self._pointers, self._capacities, strict=True):
            size = self._row_bytes(capacity)
            self._cuda.clear(pointer + row * size, size)

    def views(self, first_row: int, count: int) -> list[tuple[str, str, Any, tuple[int, ...], int]]:
        return [
            (
                *names,
                self.element,
                (count, self.heads, capacity, self.width),
                pointer + first_row * self._row_bytes(capacity),
            )
            for names, pointer, capacity in zip(self.names, self._pointers, self._capacities, strict=True)
        ]

    def free(self) -> None:
        for pointer in (*self._pointers, self._spare):
            self._release(pointer)
        self._pointers, self._spare = [0] * len(self.names), 0

    def _row_bytes(self, capacity: int) -> int:
        return self.heads * capacity * self.width * self.item

    def _copy(
        self, target: int, target_capacity: int, source: int, capacity: int, blocks: int, length: int
    ) -> None:
        """Copy the first ``length`` positions of each of ``blocks`` blocks of ``capacity`` positions."""
        position = self.width * self.item
        steps = target_capacity * position, capacity * position
        self._cuda.copy_blocks(target, steps[0], source, steps[1], length * position, blocks)

    def _release(self, pointer: int) -> None:
        if pointer:
            self._cuda.release(pointer)
