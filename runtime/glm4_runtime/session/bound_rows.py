"""The inputs and outputs of a step on some rows of the cache, bound to fixed addresses."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_runtime.session.base import Ids, Logits
from glm4_runtime.session.memory import CacheMemory

NO_ADAPTERS: Mapping[str, npt.NDArray[Any]] = {}


class BoundRows:
    """An I/O binding of ``count`` rows. Their caches are bound once, as past and as present at the same addresses.
    All other inputs are arrays; a later step of the same shapes only writes new numbers into them.

    So decoding allocates nothing per token. With a vocabulary of 151552, each row of logits would otherwise be 600 KB
    of new pages.
    """

    def __init__(
        self,
        binding: Any,
        cache: CacheMemory,
        first_row: int,
        count: int,
        device: str,
        new_logits: Callable[[tuple[int, int]], Logits],
        adapters: Mapping[str, npt.NDArray[Any]] = NO_ADAPTERS,
    ) -> None:
        self.binding = binding
        self.adapters = adapters  # further inputs, which the caller writes
        self._new_logits = new_logits  # (rows, positions)
        # Binding an input copies it to the device. So it is done for each step, unless the device is the CPU.
        self._binds_each_step = device != "cpu"
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._inputs: dict[str, npt.NDArray[Any]] = {}
        self._logits: Logits = np.empty(0, np.float32)
        for past, present, dtype, shape, address in cache.views(first_row, count):
            binding.bind_input(past, device, 0, dtype, shape, address)
            binding.bind_output(present, device, 0, dtype, shape, address)
        for name, array in adapters.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def write(self, ids: Ids, past: Sequence[int], logits_indices: Ids) -> Logits:
        """Set the inputs of the next run; returns the array that will receive its logits."""
        if self._shapes != (ids.shape, logits_indices.shape):
            count, positions = logits_indices.shape
            self._allocate(ids.shape, (count, positions))
        inputs = self._inputs
        inputs["input_ids"][...] = ids
        inputs["past_lengths"][...] = past
        inputs["logits_indices"][...] = logits_indices
        if self._binds_each_step:
            self._bind_inputs()
        return self._logits

    def forget(self) -> None:
        """Allocate new arrays for the next step, so that arrays that the caller drops are freed."""
        self._shapes = None
        self._logits = np.empty(0, np.float32)

    def _allocate(self, ids: tuple[int, ...], indices: tuple[int, int]) -> None:
        count, width = ids
        self._inputs = {
            "input_ids": np.empty(ids, np.int64),
            "past_lengths": np.empty(count, np.int32),
            "query_lengths": np.full(count, width, np.int32),
            "logits_indices": np.empty(indices, np.int64),
        }
        self._bind_inputs()
        logits = self._new_logits(indices)
        self.binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._logits, self._shapes = logits, (ids, indices)

    def _bind_inputs(self) -> None:
        for name, array in self._inputs.items():
            self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
