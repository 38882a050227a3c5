"""What an engine needs of CUDA: memory on the device, pinned memory on the host, a stream, and captured graphs."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_runtime.errors import BundleError, UnavailableError

Bytes = npt.NDArray[np.uint8]

PINNED = 0  # cudaHostAllocDefault
ANYTHING_ELSE_ALLOWED = (
    2  # cudaStreamCaptureModeRelaxed: kernels may still be loaded while a step is captured
)


def load_cudart() -> Any:
    """Import cuda-bindings, or say which extra brings it."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UnavailableError(
            f"cuda-bindings cannot be imported ({error}); install glm4-deploy[tensorrt-rtx]"
        ) from error
    return runtime


class Cuda:
    """cudart on one stream; a call that fails raises.

    Attributes:
        stream: what runs go to. It takes turns with the legacy default stream, on which the cache is moved.
    """

    def __init__(self) -> None:
        self.runtime = load_cudart()
        status, count = self.runtime.cudaGetDeviceCount()
        if int(status) or not count:
            raise UnavailableError(
                f"an engine runs on an NVIDIA GPU and CUDA finds none here ({self._name(status)}); "
                "open it on a GPU host, or export the checkpoint with --target ort"
            )
        self.stream = int(self.call("cudaStreamCreate"))
        self._device: list[int] = []
        self._pinned: list[int] = []

    def capability(self) -> str:
        """Compute capability of the device, as 89 for 8.9."""
        attributes = self.runtime.cudaDeviceAttr
        device = self.call("cudaGetDevice")
        numbers = [
            self.call("cudaDeviceGetAttribute", attribute, device)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        ]
        return "".join(map(str, numbers))

    def allocate(self, size: int) -> int:
        """Device memory until :meth:`close`."""
        self._device.append(int(self.call("cudaMalloc", max(size, 1))))
        return self._device[-1]

    def allocate_zeroed(self, size: int) -> int:
        """Device memory of zeros, which work on the stream finds so: the legacy default stream goes first."""
        pointer = self.allocate(size)
        self.call("cudaMemset", pointer, 0, size)
        return pointer

    def release(self, pointer: int) -> None:
        self._device.remove(pointer)
        self.call("cudaFree", pointer)

    def allocate_pinned(self, size: int) -> Bytes:
        """Host memory that the device copies to and from without the processor, until :meth:`close`."""
        pointer = int(self.call("cudaHostAlloc", max(size, 1), PINNED))
        self._pinned.append(pointer)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))

    def copy_in(self, target: int, source: Bytes) -> None:
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, self.stream)

    def copy_out(self, target: Bytes, source: int) -> None:
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, self.stream)

    def synchronize(self) -> None:
        self.call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what ``work`` sends to the stream, without running it; returns a graph to launch."""
        modes = self.runtime.cudaStreamCaptureMode
        self.call("cudaStreamBeginCapture", self.stream, modes(ANYTHING_ELSE_ALLOWED))
        try:
            work()
        finally:
            recorded = self.call("cudaStreamEndCapture", self.stream)
        graph = self.call("cudaGraphInstantiate", recorded, 0)
        self.call("cudaGraphDestroy", recorded)
        return graph

    def launch(self, graph: Any) -> None:
        self.call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: Any) -> None:
        self.call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        for pointer in self._pinned:
            self.call("cudaFreeHost", pointer)
        for pointer in self._device:
            self.call("cudaFree", pointer)
        self._pinned, self._device = [], []
        if self.stream:
            self.call("cudaStreamDestroy", self.stream)
            self.stream = 0

    def call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self.runtime, name)(*arguments)
        if int(status) == int(self.runtime.cudaError_t.cudaErrorMemoryAllocation):
            raise MemoryError(f"no GPU memory left ({name})")
        if int(status):
            raise BundleError(f"{name} failed on the GPU: {self._name(status)}")
        return results[0] if results else None

    def _name(self, status: Any) -> str:
        return str(getattr(status, "name", status))
