"""A CUDA runtime made of host bytes, strict about what it is given. Stands for ``cuda.bindings.runtime``.

What goes to a stream is done when somebody waits for it, as late as CUDA may: a test that reads or overwrites
too early sees it. What is sent to a stream that captures is recorded, and done when its graph is launched.
"""

import ctypes
import enum
import sys
import types
from types import SimpleNamespace

OK, INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE = 0, 1, 2, 100
TO_DEVICE, TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
ALIGNMENT = 256


class FakeCuda(types.ModuleType):
    cudaError_t = SimpleNamespace(cudaErrorMemoryAllocation=OUT_OF_MEMORY)
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=TO_DEVICE,
        cudaMemcpyDeviceToHost=TO_HOST,
        cudaMemcpyDeviceToDevice=DEVICE_TO_DEVICE,
    )
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"Global": 0, "Thread": 1, "Relaxed": 2})

    def __init__(self, limit=1 << 40, capability=(8, 9), devices=1):
        super().__init__("cuda.bindings.runtime")
        self.blocks, self.memory, self.limit, self.peak = {}, {}, limit, 0
        self.pinned, self.capability, self.devices = {}, capability, devices
        self.queues, self.recording, self.graphs, self.launches = {}, {}, {}, 0

    # Memory ----------------------------------------------------------------------------------

    def cudaMalloc(self, size):
        if size <= 0 or self.used() + size > self.limit:
            return OUT_OF_MEMORY, 0
        memory = (ctypes.c_ubyte * (size + ALIGNMENT))()
        pointer = -(-ctypes.addressof(memory) // ALIGNMENT) * ALIGNMENT
        ctypes.memset(pointer, 0xFF, size)  # garbage: memory comes as it is
        self.blocks[pointer], self.memory[pointer] = size, memory
        self.peak = max(self.peak, self.used())
        return OK, pointer

    def used(self):
        return sum(self.blocks.values())

    def cudaFree(self, pointer):
        assert not any(self.queues.values()), "freed while work is pending; CUDA may not wait for it"
        self.memory.pop(pointer, None)
        return (OK if self.blocks.pop(pointer, None) is not None else INVALID_VALUE,)

    def cudaHostAlloc(self, size, flags):
        memory = (ctypes.c_ubyte * size)()
        self.pinned[ctypes.addressof(memory)] = memory
        return OK, ctypes.addressof(memory)

    def cudaFreeHost(self, pointer):
        return (OK if self.pinned.pop(pointer, None) is not None else INVALID_VALUE,)

    def cudaMemsetAsync(self, pointer, value, size, stream):
        self.require(pointer, size)
        self.enqueue(stream, lambda: ctypes.memset(pointer, value, size))
        return (OK,)

    def cudaMemcpy2DAsync(self, target, target_pitch, source, pitch, width, height, kind, stream):
        if width > min(target_pitch, pitch) or kind != DEVICE_TO_DEVICE:
            return (INVALID_VALUE,)
        if width and height:
            self.require(target, (height - 1) * target_pitch + width)
            self.require(source, (height - 1) * pitch + width)

        def job():
            for row in range(height):
                ctypes.memmove(target + row * target_pitch, source + row * pitch, width)

        self.enqueue(stream, job)
        return (OK,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        device, host = {TO_DEVICE: (target, source), TO_HOST: (source, target)}[kind]
        self.require(device, size)
        self.require(host, size, self.pinned_sizes())
        self.enqueue(stream, lambda: ctypes.memmove(target, source, size))
        return (OK,)

    def pinned_sizes(self):
        return {pointer: len(memory) for pointer, memory in self.pinned.items()}

    def require(self, pointer, size, blocks=None):
        blocks = self.blocks if blocks is None else blocks
        inside = any(start <= pointer and pointer + size <= start + n for start, n in blocks.items())
        assert inside, f"{size} bytes at {pointer:#x} are in no allocation"

    # Devices, streams, graphs ----------------------------------------------------------------

    def cudaGetDeviceCount(self):
        return (OK, self.devices) if self.devices else (NO_DEVICE, None)

    def cudaGetDevice(self):
        return OK, 0

    def cudaDeviceGetAttribute(self, attribute, device):
        return OK, self.capability[("major", "minor").index(attribute)]

    def cudaStreamCreate(self):
        stream = len(self.queues) + 1
        self.queues[stream] = []
        return OK, stream

    def cudaStreamDestroy(self, stream):
        return (OK if self.queues.pop(stream, None) is not None else INVALID_VALUE,)

    def cudaStreamSynchronize(self, stream):
        assert stream not in self.recording, "a stream that captures cannot be waited for"
        work, self.queues[stream] = self.queues[stream], []
        for job in work:
            job()
        return (OK,)

    def wait(self):
        """All work is done, as after a look from outside."""
        for stream in self.queues:
            self.cudaStreamSynchronize(stream)

    def enqueue(self, stream, job):
        self.recording.get(stream, self.queues[stream]).append(job)

    def cudaStreamBeginCapture(self, stream, mode):
        assert isinstance(mode, self.cudaStreamCaptureMode)
        self.recording[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        return OK, self.recording.pop(stream)

    def cudaGraphInstantiate(self, recorded, flags):
        self.graphs[id(recorded)] = recorded
        return OK, id(recorded)

    def cudaGraphDestroy(self, recorded):
        return (OK,)

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        self.queues[stream] += self.graphs[graph]
        return (OK,)

    def cudaGraphExecDestroy(self, graph):
        return (OK if self.graphs.pop(graph, None) is not None else INVALID_VALUE,)


def install(monkeypatch, fake):
    """Let ``from cuda.bindings import runtime`` give the stand-in."""
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = fake
    parent = types.ModuleType("cuda")
    parent.bindings = bindings
    for name, module in {"cuda": parent, "cuda.bindings": bindings, "cuda.bindings.runtime": fake}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake
