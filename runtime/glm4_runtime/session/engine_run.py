"""One execution context of an engine, with its memory: copy inputs in, run, fetch the result, record steps.

The result is logits, or hidden states of a stage. bfloat16, which NumPy lacks, is handed over as uint16.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_runtime.bundle import COUNTERS, EngineProfile, Manifest
from glm4_runtime.errors import BundleError
from glm4_runtime.session.cuda_device import Bytes
from glm4_runtime.session.engine_files import CUDA_GRAPH, Engines

ADDRESS_STEP = 256  # bytes; TensorRT requires this alignment of every address

Array = npt.NDArray[Any]
Bound = dict[str, tuple[tuple[int, ...], int]]  # shape and address, by the tensor's name


def host_type(name: str) -> np.dtype[Any]:
    """The NumPy type of an engine's input or output."""
    return np.dtype("uint16" if name == "bfloat16" else name)


class EngineRun:
    """One context with its inputs and its output, each a block on the device and a pinned block on the host."""

    def __init__(
        self,
        engines: Engines,
        profile: EngineProfile,
        manifest: Manifest,
        rows: int,
        bound: Bound,
    ) -> None:
        self._engines, self._cuda, self._manifest = engines, engines.cuda, manifest
        self._context = engines.context(profile, eager=profile.name == "decode")
        self._names = {spec.name for spec in manifest.inputs}
        self._graph: Any = None
        self._steps = 0
        largest = {name: values[2] for name, values in profile.axes.items()} | {"batch": rows}
        self._places: dict[str, tuple[int, np.dtype[Any]]] = {}
        size = 0
        for spec in manifest.inputs:
            if not spec.name.startswith("past_key_values.") and spec.name != COUNTERS:
                dtype = host_type(spec.dtype)
                self._places[spec.name] = size, dtype
                count = int(np.prod([largest[a] if isinstance(a, str) else a for a in spec.shape]))
                size += -(-count * dtype.itemsize // ADDRESS_STEP) * ADDRESS_STEP
        self._output, self._type = manifest.outputs[0], host_type(manifest.outputs[0].dtype)
        count = int(np.prod([largest[a] if isinstance(a, str) else a for a in self._output.shape]))
        self._staged, self._inputs = self._cuda.allocate_pinned(size), self._cuda.allocate(size)
        given = count * self._type.itemsize
        self._fetched, self._result = self._cuda.allocate_pinned(given), self._cuda.allocate(given)
        self._bind(self._output.name, self._result)
        for name, (offset, _) in self._places.items():
            self._bind(name, self._inputs + offset)
        self._bind_all(bound)

    def run(self, arrays: dict[str, Array], bound: Bound) -> Array:
        """Run with inputs of any shape within the profile, on the cache's rows."""
        self._bind_all(bound)
        self._stage(arrays)
        fetched, shape = self._outcome(arrays)
        self._enqueue(fetched)
        self._cuda.synchronize()
        return fetched.view(self._type).reshape(shape)

    def step(self, arrays: dict[str, Array]) -> Array:
        """Run with inputs of this context's one shape. The second call records a graph, later calls replay it."""
        fetched, shape = self._outcome(arrays)
        self._stage(arrays, fixed=self._steps > 0)
        if self._graph is None and self._steps > 0 and self._engines.capturable(self._context):
            self._record(fetched)
        if self._graph is None:
            self._enqueue(fetched)
        else:
            self._cuda.launch(self._graph)
        self._cuda.synchronize()
        self._steps += 1
        return fetched.view(self._type).reshape(shape)

    def close(self) -> None:
        if self._graph is not None:
            self._cuda.destroy(self._graph)
            self._graph = None

    def _record(self, fetched: Bytes) -> None:
        try:
            self._graph = self._cuda.capture(lambda: self._enqueue(fetched))
        except (BundleError, MemoryError) as error:
            self._engines.skipped[CUDA_GRAPH] = str(error)  # permanently: later steps would fail the same way

    def _stage(self, arrays: dict[str, Array], fixed: bool = False) -> None:
        for name, array in arrays.items():
            offset, dtype = self._places[name]
            flat = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)
            self._staged[offset : offset + flat.nbytes] = flat
            if not fixed:
                self._shape(name, array.shape)

    def _outcome(self, arrays: dict[str, Array]) -> tuple[Bytes, tuple[int, ...]]:
        """The pinned output of this run, and its shape."""
        axes: dict[str, int] = {}
        for spec in self._manifest.inputs:
            if spec.name in arrays:
                axes |= {str(a): n for a, n in zip(spec.shape, arrays[spec.name].shape, strict=True)}
        shape = tuple(axes[a] if isinstance(a, str) else a for a in self._output.shape)
        return self._fetched[: self._type.itemsize * int(np.prod(shape))], shape

    def _enqueue(self, fetched: Bytes) -> None:
        self._cuda.copy_in(self._inputs, self._staged)
        if not self._context.execute_async_v3(self._cuda.stream):
            raise BundleError("the engine did not start a run; run glm4-deploy doctor")
        self._cuda.copy_out(fetched, self._result)

    def _bind_all(self, bound: Bound) -> None:
        for name, (shape, address) in bound.items():
            self._bind(name, address)
            if name in self._names:
                self._shape(name, shape)

    def _bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise BundleError(f"the engine has no tensor {name}; export the bundle again")

    def _shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise BundleError(f"the engine takes no {name} of shape {shape}; export the bundle again")
