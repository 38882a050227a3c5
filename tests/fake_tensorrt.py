"""Both TensorRTs, with engines that are ONNX graphs run by ONNX Runtime, in the memory of a :mod:`fake_cuda`.

``FakeTensorRt`` has what the session uses of the full one and no other name, ``FakeRtx`` what TensorRT-RTX has
more. Both refuse what TensorRT refuses: shapes outside the profile, tensors without an address or at an odd one,
a cache that is not updated in place, activations of no memory.
"""

import ctypes
import dataclasses
import enum
import json
import sys
import types

import ml_dtypes
import numpy as np
import onnxruntime

from glm4_exporters.stages import stage_profiles
from glm4_runtime.bundle import (
    COUNTERS,
    ENGINE,
    GRAPH,
    PRESENT_COUNTERS,
    EngineInfo,
    EngineProfile,
    TensorSpec,
    file_entry,
    read_manifest,
    write_manifest,
)
from glm4_runtime.session.engine_files import TENSORRT_TYPES

VERSIONS = {"tensorrt-rtx": "1.7.1.116", "tensorrt": "11.4.0.106"}
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
}
ACTIVATION_BYTES = 4096
# What the classes below stand for, by kind: none has a public name that its original lacks.
ORIGINALS = {
    "tensorrt": {
        "FakeTensorRt": "", "FakeRuntime": "Runtime", "FakeEngine": "ICudaEngine", "FakeConfig": "IRuntimeConfig",
        "FakeContext": "IExecutionContext",
    },
    "tensorrt-rtx": {
        "FakeRtx": "", "FakeRtxRuntime": "Runtime", "FakeRtxEngine": "ICudaEngine", "FakeCache": "IRuntimeCache",
        "FakeRtxConfig": "IRuntimeConfig", "FakeRtxContext": "IExecutionContext",
    },
}  # fmt: skip


def make_engine_bundle(
    folder,
    profiles,
    capacity,
    later_gpus=False,
    counters=None,
    kind="tensorrt-rtx",
    capabilities=("80", "89"),
):
    """Turn a native bundle's folder into an engine bundle whose engine is its graph, or whose engines are its stages'.

    With ``counters``, one whose attention is our plugin: it has so many of them, and computes as the graph does.
    """
    manifest = read_manifest(folder)
    axes = {p.name: {k: list(v) for k, v in p.axes.items()} for p in profiles}
    profiles = tuple(EngineProfile(p.name, ENGINE, i, p.axes) for i, p in enumerate(profiles))
    stages = tuple(
        dataclasses.replace(stage, profiles=stage_profiles(profiles, number))
        for number, stage in enumerate(manifest.stages, 1)
    )
    graphs = {stage.profiles[0].file: stage.graph for stage in stages} or {ENGINE: GRAPH}
    for file, graph in graphs.items():
        described = {"graph": str(folder / graph), "profiles": axes, "counters": counters}
        (folder / file).write_text(json.dumps(described))
    static = {
        side: tuple(
            dataclasses.replace(s, shape=tuple(capacity if a == "capacity" else a for a in s.shape))
            for s in getattr(manifest, side)
        )
        for side in ("inputs", "outputs")
    }
    if counters is not None:
        static["inputs"] += (TensorSpec(COUNTERS, "int32", (counters,)),)
        static["outputs"] += (TensorSpec(PRESENT_COUNTERS, "int32", (counters,)),)
    engine = EngineInfo(
        kind=kind,
        version=VERSIONS[kind],
        layout="shared",
        later_gpus=later_gpus,
        attention="native" if counters is None else "plugin",
        plugin_version=None if counters is None else "1",
        profiles=() if stages else profiles,
        layers={},
        float32={},
        built_from={},
    )
    # The graph of an engine's bundle is native; another one stands for the engine alone.
    kept = {
        name: entry
        for name, entry in manifest.files.items()
        if name not in graphs.values() or manifest.dialect == "native"
    }
    files = {**kept, **{name: file_entry(folder / name) for name in graphs}}
    made = dataclasses.replace(
        manifest,
        dialect=kind,
        engine=engine,
        files=files,
        compute_capabilities=capabilities,
        stages=stages,
        **static,
    )
    write_manifest(folder, made)
    return folder


class FakeTensorRt(types.ModuleType):
    """Full TensorRT."""

    __version__ = VERSIONS["tensorrt"]
    _module = "tensorrt"
    DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64")
    TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
    ExecutionContextAllocationStrategy = enum.Enum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")

    class ILogger:
        ERROR = 1

    def __init__(self, cuda):
        super().__init__(self._module)
        self.cuda, self.reasons, self.in_place, self.contexts = cuda, 0, True, []
        self.compiled = []

    def Runtime(self, logger):
        return FakeRuntime(self)


class FakeRtx(FakeTensorRt):
    """TensorRT-RTX."""

    __version__ = VERSIONS["tensorrt-rtx"]
    _module = "tensorrt_rtx"
    ComputeCapability = enum.Enum("ComputeCapability", "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121")
    DynamicShapesKernelSpecializationStrategy = enum.Enum("Kernels", "LAZY EAGER NONE")
    EngineValidity = enum.Enum("EngineValidity", "VALID SUBOPTIMAL INVALID")
    EngineInvalidityDiagnostics = enum.IntFlag(
        "EngineInvalidityDiagnostics", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4}
    )

    def Runtime(self, logger):
        return FakeRtxRuntime(self)


def install(monkeypatch, cuda, kind="tensorrt-rtx"):
    fake = {"tensorrt-rtx": FakeRtx, "tensorrt": FakeTensorRt}[kind](cuda)
    monkeypatch.setitem(sys.modules, fake._module, fake)
    return fake


class FakeRuntime:
    def __init__(self, trt):
        self.trt = trt

    def deserialize_cuda_engine(self, data):
        return FakeEngine(self.trt, json.loads(bytes(data)))


class FakeRtxRuntime(FakeRuntime):
    def get_engine_validity(self, data):
        kinds = self.trt.EngineValidity
        return (kinds.INVALID if self.trt.reasons else kinds.VALID), self.trt.reasons

    def deserialize_cuda_engine(self, data):
        return FakeRtxEngine(self.trt, json.loads(bytes(data)))


class FakeEngine:
    device_memory_size_v2 = ACTIVATION_BYTES

    def __init__(self, trt, described):
        self.trt, self.profiles = trt, list(described["profiles"].values())
        self.session = onnxruntime.InferenceSession(described["graph"], providers=["CPUExecutionProvider"])
        self.inputs = {i.name: (TYPES[i.type], i.shape) for i in self.session.get_inputs()}
        self.computed = [o.name for o in self.session.get_outputs()]
        self.outputs, self.by_plugin = list(self.computed), described["counters"] is not None
        if self.by_plugin:
            self.inputs[COUNTERS] = np.int32, [described["counters"]]
            self.outputs.append(PRESENT_COUNTERS)
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index):
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name):
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        kinds = {
            value.name: value.type for value in (*self.session.get_inputs(), *self.session.get_outputs())
        }
        found = np.dtype(TYPES[kinds.get(name, "tensor(int32)")]).name  # the counters of the plugin
        return self.trt.DataType[TENSORRT_TYPES[found]]

    def get_aliased_input_tensor(self, name):
        past = name.replace("present_", "past_", 1)
        if self.by_plugin:
            return None  # TensorRT tells the aliases of its own layers only
        return past if self.trt.in_place and past in self.inputs and name.startswith("present_") else None

    def create_runtime_config(self):
        return FakeConfig(self.trt)

    def create_execution_context(self, strategy_or_config):
        context = FakeContext(self, strategy_or_config)
        self.trt.contexts.append(context)
        return context


class FakeRtxEngine(FakeEngine):
    def create_runtime_config(self):
        return FakeRtxConfig(self.trt)

    def create_execution_context(self, config):
        context = FakeRtxContext(self, config)
        self.trt.contexts.append(context)
        return context


class FakeCache:
    """Holds the shapes that were compiled; refuses what another GPU wrote."""

    def __init__(self, capability):
        self.header, self.compiled = f"{capability}:".encode(), set()

    def deserialize(self, blob):
        if not blob.startswith(self.header):
            return False
        self.compiled = set(blob[len(self.header) :].split(b"|"))
        return True

    def serialize(self):
        return self.header + b"|".join(sorted(self.compiled)) if self.compiled else None


class FakeConfig:
    __slots__ = ("_strategy", "_trt")  # an attribute that full TensorRT has not cannot be set

    def __init__(self, trt):
        self._trt = trt

    def set_execution_context_allocation_strategy(self, strategy):
        self._strategy = strategy


class FakeRtxConfig(FakeConfig):
    __slots__ = ("_cache", "dynamic_shapes_kernel_specialization_strategy")

    def create_runtime_cache(self):
        return FakeCache(self._trt.cuda.capability)

    def set_runtime_cache(self, cache):
        self._cache = cache


class FakeContext:
    def __init__(self, engine, strategy_or_config):
        strategy = getattr(strategy_or_config, "_strategy", strategy_or_config)
        assert strategy.name == "USER_MANAGED"
        self.engine, self.config, self.memory = engine, strategy_or_config, None
        self.shapes, self.addresses, self.runs = {}, {}, []

    def set_device_memory(self, memory, size):
        assert size >= ACTIVATION_BYTES
        self.engine.trt.cuda.require(memory, size)
        self.memory = memory

    def set_optimization_profile_async(self, index, stream):
        self.profile = self.engine.profiles[index]
        return True

    def set_input_shape(self, name, shape):
        axes = self.engine.inputs[name][1]
        for axis, size in zip(axes, shape, strict=True):
            low, _, high = self.profile.get(axis, (axis,) * 3) if axis != "capacity" else (size,) * 3
            if not low <= size <= high:
                return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        assert address % 256 == 0, f"{name} at {address:#x}"
        self.addresses[name] = address
        return name in self.engine.inputs or name in self.engine.outputs

    def execute_async_v3(self, stream):
        assert self.memory, "no activations"
        engine, shapes, addresses = self.engine, dict(self.shapes), dict(self.addresses)
        assert set(shapes) == set(engine.inputs)
        assert set(addresses) == {*engine.inputs, *engine.outputs}
        for name in engine.outputs:
            if name.startswith("present_"):
                past = COUNTERS if name == PRESENT_COUNTERS else name.replace("present_", "past_", 1)
                assert addresses[name] == addresses[past], "not in place"
        cuda = engine.trt.cuda
        if stream in cuda.recording:
            assert self.runs[-1:] == [shapes], "captured before it ran with these shapes"
        self.runs.append(shapes)
        self._compile(shapes)

        def job():
            inputs = {
                name: _array(cuda, addresses[name], dtype, shapes[name])
                for name, (dtype, _) in engine.inputs.items()
            }
            if engine.by_plugin:
                assert not inputs.pop(COUNTERS).any(), "counters that are not zero"
            for name, found in zip(engine.computed, engine.session.run(None, inputs), strict=True):
                _array(cuda, addresses[name], found.dtype, found.shape)[...] = found

        cuda.enqueue(stream, job)
        return True

    def _compile(self, shapes):
        """A full TensorRT's kernels are in its engine."""


class FakeRtxContext(FakeContext):
    def is_stream_capturable(self, stream):
        return bool(self.runs) and self.runs[-1] == self.shapes

    def _compile(self, shapes):
        kernel = str(shapes[next(iter(self.engine.inputs))]).encode()
        if kernel not in self.config._cache.compiled:
            self.config._cache.compiled.add(kernel)
            self.engine.trt.compiled.append(kernel)


def _array(cuda, address, dtype, shape):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    cuda.require(address, size)
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)
