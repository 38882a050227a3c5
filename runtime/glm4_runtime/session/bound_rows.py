"""The inputs and outputs of a step on some rows of the cache, bound to fixed addresses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_runtime.session.base import Ids
from glm4_runtime.session.memory import CacheMemory

NO_ADAPTERS: Mapping[str, npt.NDArray[Any]] = {}


@dataclass(frozen=True)
class Ends:
    """The input and the output of a graph that a step passes on; the other ones are lengths and caches.

    Attributes:
        indices: whether the graph has ``logits_indices``, so that its output has these positions. Without, its output
            has all positions.
    """

    entry: str = "input_ids"
    result: str = "logits"
    indices: bool = True


WHOLE = Ends()  # a graph of all layers


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
        new_result: Callable[[tuple[int, int]], npt.NDArray[Any]],
        adapters: Mapping[str, npt.NDArray[Any]] = NO_ADAPTERS,
        ends: Ends = WHOLE,
    ) -> None:
        self.binding, self._ends = binding, ends
        self.adapters = adapters  # further inputs, which the caller writes
        self._new_result = new_result  # (rows, positions)
        # Binding an input copies it to the device. So it is done for each step, unless the device is the CPU.
        self._binds_each_step = device != "cpu"
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._inputs: dict[str, npt.NDArray[Any]] = {}
        self._result: npt.NDArray[Any] = np.empty(0, np.float32)
        for past, present, dtype, shape, address in cache.views(first_row, count):
            binding.bind_input(past, device, 0, dtype, shape, address)
            binding.bind_output(present, device, 0, dtype, shape, address)
        for name, array in adapters.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def write(self, values: npt.NDArray[Any], past: Sequence[int], logits_indices: Ids) -> npt.NDArray[Any]:
        """Set the inputs of the next run; returns the array that will receive its result.

        Args:
            values: token ids [rows, width], or hidden states [rows, width, hidden].
        """
        if self._shapes != (values.shape, logits_indices.shape):
            self._allocate(values, logits_indices)
        inputs = self._inputs
        inputs[self._ends.entry][...] = values
        inputs["past_lengths"][...] = past
        if self._ends.indices:
            inputs["logits_indices"][...] = logits_indices
        if self._binds_each_step:
            self._bind_inputs()
        return self._result

    def forget(self) -> None:
        """Allocate new arrays for the next step, so that arrays that the caller drops are freed."""
        self._shapes = None
        self._result, self._inputs = np.empty(0, np.float32), {}

    def _allocate(self, values: npt.NDArray[Any], indices: Ids) -> None:
        count, width = values.shape[:2]
        self._inputs = {
            self._ends.entry: np.empty(values.shape, values.dtype),
            "past_lengths": np.empty(count, np.int32),
            "query_lengths": np.full(count, width, np.int32),
        }
        if self._ends.indices:
            self._inputs["logits_indices"] = np.empty(indices.shape, np.int64)
        self._bind_inputs()
        result = self._new_result((count, indices.shape[1] if self._ends.indices else width))
        name, address = self._ends.result, result.ctypes.data
        self.binding.bind_output(name, "cpu", 0, result.dtype, result.shape, address)
        self._result, self._shapes = result, (values.shape, indices.shape)

    def _bind_inputs(self) -> None:
        for name, array in self._inputs.items():
            self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
