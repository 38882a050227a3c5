"""A libcuda of Python: what a launch through CUDA's driver is given, and what the driver refuses."""

import ctypes
from types import SimpleNamespace

from benchmarks.gpu_check.driver import INVALID_VALUE, MAX_DYNAMIC_SHARED


class FakeLibrary:
    """libcuda: modules with one function, whose parameters and launches are remembered."""

    def __init__(self, sizes, limit=48 * 1024):
        self.sizes, self.limit, self.launches, self.open = sizes, limit, [], 0

    def cuModuleLoadData(self, module, ptx):
        if not ptx.value.startswith(b"//"):
            return 218
        self.program, self.open = ptx.value, self.open + 1
        module._obj.value = 77
        return 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = 88
        return 0 if name.value in self.program else 500

    def cuModuleUnload(self, module):
        self.open -= 1
        return 0

    def cuFuncGetParamInfo(self, function, index, offset, size):
        if index.value >= len(self.sizes):
            return INVALID_VALUE
        size._obj.value = self.sizes[index.value]
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        assert (function.value, attribute.value) == (88, MAX_DYNAMIC_SHARED)
        self.limit = value.value
        return 0

    def cuLaunchKernel(self, function, *rest):
        *sizes, stream, places, _ = rest
        shared = sizes[-1].value
        if shared > self.limit:
            return INVALID_VALUE
        kinds = [ctypes.c_uint64 if size == 8 else ctypes.c_int32 for size in self.sizes]
        values = [kind.from_address(place).value for kind, place in zip(kinds, places, strict=True)]
        self.launches.append(
            SimpleNamespace(sizes=[s.value for s in sizes], stream=stream.value, values=values)
        )
        return 0

    def cuGetErrorName(self, status, text):
        names = {1: b"CUDA_ERROR_INVALID_VALUE", 218: b"CUDA_ERROR_INVALID_PTX", 500: b"CUDA_ERROR_NOT_FOUND"}
        text._obj.value = names[status.value]
        return 0


class FakeGpu:
    """libcuda, asked what its GPU is."""

    model, attributes = b"NVIDIA H100 80GB HBM3", {75: 9, 76: 0, 16: 132}

    def cuInit(self, flags):
        return 0

    def cuDeviceGetName(self, name, size, device):
        name.value = self.model
        return 0

    def cuDeviceGetAttribute(self, number, attribute, device):
        number._obj.value = self.attributes[attribute]
        return 0
