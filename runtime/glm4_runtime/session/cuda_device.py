"""CUDA for a session: device memory, pinned host memory, one stream, and captured graphs."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_runtime.errors import BundleError, UnavailableError
from glm4_runtime.install import install_command

Bytes = npt.NDArray[np.uint8]

PINNED = 0  # cudaHostAllocDefault
ANYTHING_ELSE_ALLOWED = (
    2  # cudaStreamCaptureModeRelaxed: kernels may still be loaded while a step is captured
)


def load_cudart(extra: str) -> Any:
    """Import cuda-bindings, or name the extra that installs it."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UnavailableError(
            f"cuda-bindings cannot be imported ({error}); run {install_command(extra)}"
        ) from error
    return runtime


class Cuda:
    """cudart on one stream. A call that fails raises.

    All work of a session goes to this stream, in order: runs, copies, and changes of the cache. So nothing depends on
    the order of other streams.

    Args:
        extra: the extra that installs cuda-bindings.
        instead: what to do on a host without a GPU.

    Attributes:
        stream: the one stream.
    """

    def __init__(self, extra: str, instead: str) -> None:
        self.runtime = load_cudart(extra)
        status, count = self.runtime.cudaGetDeviceCount()
        if int(status) or not count:
            raise UnavailableError(f"CUDA finds no NVIDIA GPU here ({self._name(status)}); {instead}")
        self.stream = int(self.call("cudaStreamCreate"))
        self._device: list[int] = []
        self._pinned: list[int] = []

    def capability(self) -> str:
        """Compute capability of the device, such as 89 for 8.9."""
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
        """Device memory of zeros."""
        pointer = self.allocate(size)
        self.clear(pointer, size)
        return pointer

    def clear(self, pointer: int, size: int) -> None:
        """Set device memory to zeros."""
        self.call("cudaMemsetAsync", pointer, 0, size, self.stream)

    def copy_blocks(
        self, target: int, target_step: int, source: int, step: int, size: int, count: int
    ) -> None:
        """Copy ``size`` bytes of each of ``count`` blocks within the device; blocks begin ``step`` bytes apart."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy2DAsync", target, target_step, source, step, size, count, kind, self.stream)

    def release(self, pointer: int) -> None:
        """Free device memory, after all work in the stream."""
        self.synchronize()
        self._device.remove(pointer)
        self.call("cudaFree", pointer)

    def allocate_pinned(self, size: int) -> Bytes:
        """Pinned host memory, until :meth:`close`."""
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
        """Record the calls of ``work`` on the stream without running them; returns a graph to launch.

        Raises:
            BundleError: the first failure. The stream stays usable.
        """
        modes = self.runtime.cudaStreamCaptureMode
        self.call("cudaStreamBeginCapture", self.stream, modes(ANYTHING_ELSE_ALLOWED))
        try:
            work()
        except BaseException:
            status, recorded = self.runtime.cudaStreamEndCapture(self.stream)
            if not int(status):
                self.runtime.cudaGraphDestroy(recorded)
            raise
        recorded = self.call("cudaStreamEndCapture", self.stream)
        try:
            return self.call("cudaGraphInstantiate", recorded, 0)
        finally:
            self.call("cudaGraphDestroy", recorded)

    def launch(self, graph: Any) -> None:
        self.call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: Any) -> None:
        self.call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        if self.stream:
            self.synchronize()
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
