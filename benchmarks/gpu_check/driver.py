"""The CUDA driver's own functions, as TensorRT uses them for a plugin's PTX: load, ask, launch. Nothing of Triton."""

import ctypes
from collections.abc import Sequence
from typing import Any

DRIVER = "libcuda.so.1"
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE
WARP = 32


class DriverError(RuntimeError):
    """A function of the driver did not succeed."""


class Driver:
    """The functions that a launch needs, in the context that is current in this thread.

    Args:
        library: stands for libcuda where there is none.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = library or ctypes.CDLL(DRIVER)

    def load(self, ptx: str, name: str) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        """Assemble PTX for the GPU: its module, and the function of this name."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx.encode()))
        try:
            self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(name.encode()))
        except DriverError:
            self.unload(module)
            raise
        return module, function

    def unload(self, module: ctypes.c_void_p) -> None:
        self._call("cuModuleUnload", module)

    def parameter_sizes(self, function: ctypes.c_void_p) -> list[int]:
        """Bytes of each parameter, as the driver reads them from the program."""
        sizes: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        ask = self._library.cuFuncGetParamInfo
        while True:
            index = ctypes.c_size_t(len(sizes))
            status = ask(function, index, ctypes.byref(offset), ctypes.byref(size))
            if status == INVALID_VALUE:  # there are no more
                return sizes
            self._require("cuFuncGetParamInfo", status)
            sizes.append(size.value)

    def allow_shared(self, function: ctypes.c_void_p, size: int) -> None:
        """Let launches use so many bytes of dynamic shared memory; without it 48 KiB are the most."""
        self._call("cuFuncSetAttribute", function, ctypes.c_int(MAX_DYNAMIC_SHARED), ctypes.c_int(size))

    def launch(
        self,
        function: ctypes.c_void_p,
        blocks: int,
        warps: int,
        shared: int,
        stream: int,
        arguments: Sequence[Any],
    ) -> None:
        """Launch a grid of one dimension; ``arguments`` are ctypes values in the order of the parameters."""
        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        sizes = [ctypes.c_uint(n) for n in (blocks, 1, 1, WARP * warps, 1, 1, shared)]
        self._call("cuLaunchKernel", function, *sizes, ctypes.c_void_p(stream), places, None)

    def _call(self, name: str, *arguments: Any) -> None:
        self._require(name, getattr(self._library, name)(*arguments))

    def _require(self, name: str, status: int) -> None:
        if status:
            said = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(status), ctypes.byref(said))
            raise DriverError(f"{name}: {(said.value or str(status).encode()).decode()}")
