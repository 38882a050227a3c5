"""The session on TensorRT engines, TensorRT-RTX's and the full one's: no torch, no Triton, no plugin library.

The cache is allocated once at the engine's capacity and bound as past and present at one address. A prefill
runs one sequence in any row; a decode step runs the rows 0 ... n - 1, and from its second time on is one
launch of a CUDA graph, captured per n. All contexts share one set of weights and one block of activations.
"""

import contextlib
import mmap
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_runtime.bundle import COUNTERS, PRESENT_COUNTERS, EngineInfo, EngineProfile, Manifest
from glm4_runtime.errors import BundleError, UnavailableError
from glm4_runtime.kv_cache import Move
from glm4_runtime.session.base import Ids, Logits, Session
from glm4_runtime.session.cuda_device import Bytes, Cuda
from glm4_runtime.session.cuda_memory import CudaMemory
from glm4_runtime.session.kernel_cache import KernelCache

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
NUMPY_TYPES: dict[str, type[np.generic]] = {"int64": np.int64, "int32": np.int32, "float32": np.float32}
ADDRESS_STEP = 256  # bytes; what TensorRT asks of every address
WIDTH_STEP = (
    64  # prefill widths: powers of two up to here, then multiples; few shapes, so few kernels to make
)

Bound = dict[str, tuple[tuple[int, ...], int]]  # shape and address by the tensor's name


def load_tensorrt(engine: EngineInfo) -> Any:
    """Import the TensorRT that an engine was built by, of the same version.

    Raises:
        UnavailableError: it is missing or of another version; says what to install or to export.
    """
    name = MODULES[engine.kind]
    try:
        trt = import_module(name)
    except ImportError as error:
        raise UnavailableError(
            f"{name} cannot be imported ({error}); install {engine.kind}=={engine.version}"
        ) from error
    if trt.__version__ != engine.version:
        raise UnavailableError(
            f"the engine was built by {engine.kind} {engine.version} and {trt.__version__} is installed; "
            f"install {engine.kind}=={engine.version}, or export the bundle again with {trt.__version__}"
        )
    return trt


def require_capability(manifest: Manifest, engine: EngineInfo, found: str) -> None:
    """Refuse a GPU that the engine was not built for."""
    built_for = manifest.compute_capabilities
    oldest = min(map(int, built_for))
    if found in built_for or (engine.later_gpus and int(found) > oldest):
        return
    option = f" --sm {found}" if engine.kind == "tensorrt-rtx" else " on this host"
    raise UnavailableError(
        f"the engine was built for compute capability {', '.join(built_for)}"
        f"{' and later' if engine.later_gpus else ''} and this GPU has {found}; "
        f"export the bundle again for {engine.kind}{option}"
    )


def padded_width(width: int, limit: int) -> int:
    """The width that a run of ``width`` positions is given, at most ``limit``."""
    step = 1 << (width - 1).bit_length() if width <= WIDTH_STEP else -(-width // WIDTH_STEP) * WIDTH_STEP
    return min(step, limit)


class TensorRtSession(Session):
    """A bundle whose dialect is ``tensorrt-rtx`` or ``tensorrt``."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        max_seq_len: int,
        max_batch_size: int,
        *,
        provider: str | None,
        threads: int | None,
        prefill_chunk: int,
    ) -> None:
        super().__init__(folder, manifest, max_seq_len, max_batch_size, prefill_chunk)
        for name, value in (("provider", provider), ("threads", threads)):
            if value is not None:
                raise BundleError(f"the bundle is an engine, to which {name} means nothing; leave it out")
        assert manifest.engine is not None
        trt = load_tensorrt(manifest.engine)
        self._closers = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.push(self._closers)
            self._cuda = Cuda()
            self._closers.callback(self._cuda.close)
            capability = self._cuda.capability()
            require_capability(manifest, manifest.engine, capability)
            self.provider = f"{manifest.engine.kind} {trt.__version__}, GPU {capability}"
            self._open_runs(_Engines(trt, folder, manifest, manifest.engine, self._cuda))
            undo.pop_all()

    def _open_runs(self, engines: "_Engines") -> None:
        self._closers.callback(engines.close)
        manifest, profiles = self.manifest, {p.name: p for p in engines.info.profiles}
        if manifest.kv_cache is None:
            self._encode = _Run(engines, profiles["encode"], manifest, 1, {})
            return
        self._prefill_profile = profiles["prefill"]
        self.prefill_chunk = min(self.prefill_chunk, self._prefill_profile.axes["sequence"][2])
        self._capacity = _cache_capacity(manifest)
        self._cache = CudaMemory(manifest, self.max_batch_size)
        self._closers.callback(self._cache.free)
        try:
            self._cache.resize(self._capacity, 0)
        except MemoryError as error:
            raise BundleError(
                f"no GPU memory for a KV cache of {self.max_batch_size} slots of {self._capacity} positions; "
                "open the session with a lower max_batch_size, or export with a lower --max-seq-len"
            ) from error
        self._counters = self._new_counters()
        self._prefill = _Run(engines, self._prefill_profile, manifest, 1, self._counters)
        self._decode: dict[int, _Run] = {}
        self._new_decode: Callable[[int], _Run] = lambda rows: _Run(
            engines, profiles["decode"], manifest, rows, self._rows(0, rows) | self._counters
        )

    def _new_counters(self) -> Bound:
        """The plugin's counters, one buffer as input and as output; every run finds them zero and leaves them so."""
        for spec in self.manifest.inputs:
            if spec.name == COUNTERS:
                shape = tuple(int(axis) for axis in spec.shape)
                bound = shape, self._cuda.allocate_zeroed(4 * int(np.prod(shape)))
                return {COUNTERS: bound, PRESENT_COUNTERS: bound}
        return {}

    def _run_decoder(self, first_row: int, ids: Ids, past: Sequence[int], logits_indices: Ids) -> Logits:
        count, width = ids.shape
        if first_row == 0 and width == 1:
            return self._step(ids, past)
        asked = self._prefill_profile.axes["positions"][2]
        if logits_indices.shape[1] > asked:
            return self._run_in_parts(first_row, ids, past, logits_indices, asked)
        assert count == 1
        room = self._capacity - past[0]
        padded = min(padded_width(width, self._prefill_profile.axes["sequence"][2]), room)
        tokens = np.zeros((1, padded), np.int64)
        tokens[:, :width] = ids
        return self._prefill.run(
            {
                "input_ids": tokens,
                "past_lengths": np.asarray(past, np.int32),
                "query_lengths": np.array([width], np.int32),
                "logits_indices": logits_indices,
            },
            self._rows(first_row, 1),
        )

    def _run_in_parts(
        self, first_row: int, ids: Ids, past: Sequence[int], logits_indices: Ids, asked: int
    ) -> Logits:
        """More logits than the engine has room for: as many positions at a time as it has."""
        parts, width = [], ids.shape[1]
        for start in range(0, width, asked):
            stop = min(start + asked, width)
            wanted = logits_indices[0][(logits_indices[0] >= start) & (logits_indices[0] < stop)] - start
            indices = wanted if len(wanted) else np.array([stop - start - 1])
            logits = self._run_decoder(first_row, ids[:, start:stop], [past[0] + start], indices[None])
            if len(wanted):
                parts.append(logits.copy())
        return np.concatenate(parts, axis=1)

    def _step(self, ids: Ids, past: Sequence[int]) -> Logits:
        rows = len(past)
        if rows not in self._decode:
            self._decode[rows] = self._new_decode(rows)
        return self._decode[rows].step(
            {
                "input_ids": ids,
                "past_lengths": np.asarray(past, np.int32),
                "query_lengths": np.ones(rows, np.int32),
                "logits_indices": np.zeros((rows, 1), np.int64),
            }
        )

    def _rows(self, first_row: int, count: int) -> Bound:
        """Shape and address of every past and present, the same for both of a pair."""
        bound: Bound = {}
        for past, present, _, shape, address in self._cache.views(first_row, count):
            bound[past] = bound[present] = shape, address
        return bound

    def _run_encoder(self, ids: Ids) -> Logits:
        width = ids.shape[1]
        assert self.manifest.engine is not None
        padded = padded_width(width, self.manifest.engine.profiles[0].axes["sequence"][2])
        tokens = np.zeros((1, padded), np.int64)
        tokens[:, :width] = ids
        result = self._encode.run({"input_ids": tokens, "query_lengths": np.array([width], np.int32)}, {})
        return result[:, :width] if "sequence" in self.manifest.outputs[0].shape else result

    def _move_row(self, move: Move) -> None:
        self._cache.move(move)

    def _clear_row(self, row: int) -> None:
        self._cache.clear(row)

    def _fit_cache(self, needed: int) -> None:
        """The engine's capacity is fixed: the cache has it from the start."""

    def _resize_cache(self, capacity: int) -> None:
        raise AssertionError(f"an engine's cache has one capacity, {self._capacity}, not {capacity}")

    def close(self) -> None:
        for run in getattr(self, "_decode", {}).values():
            run.close()
        self._closers.close()


def _cache_capacity(manifest: Manifest) -> int:
    shape = next(spec.shape for spec in manifest.inputs if spec.name.startswith("past_key_values."))
    assert isinstance(shape[2], int)
    return shape[2]


class _Engines:
    """The engine files of a bundle, loaded, and the activations that all their contexts take turns in."""

    def __init__(self, trt: Any, folder: Path, manifest: Manifest, info: EngineInfo, cuda: Cuda) -> None:
        self.trt, self.info, self.cuda = trt, info, cuda
        self._hashes = {name: entry.sha256 for name, entry in manifest.files.items()}
        self._kernels: dict[str, KernelCache] = {}
        self._log = _errors_of(trt)
        self._runtime = trt.Runtime(self._log)
        files = dict.fromkeys(profile.file for profile in info.profiles)
        self._engines = {name: self._load(folder / name) for name in files}
        self._check_names()
        self.activation_bytes = max(engine.device_memory_size_v2 for engine in self._engines.values())
        self.activations = cuda.allocate(self.activation_bytes)

    def _load(self, path: Path) -> Any:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._require_validity(path, data)
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._refusal(path, next(iter(self._log.messages), "it does not say why"))
        return engine

    def _require_validity(self, path: Path, data: Any) -> None:
        """TensorRT-RTX can say what is wrong before it loads."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, reasons = self._runtime.get_engine_validity(data)
        if validity == self.trt.EngineValidity.INVALID:
            known = self.trt.EngineInvalidityDiagnostics.__members__.items()
            names = [name.lower().replace("_", " ") for name, bit in known if int(bit) & int(reasons)]
            raise self._refusal(path, ", ".join(names) or next(iter(self._log.messages), "no reason given"))

    def _refusal(self, path: Path, reason: str) -> BundleError:
        return BundleError(
            f"{self.info.kind} {self.info.version} cannot load {path} on this GPU: {' '.join(reason.split())}; "
            "update the driver where it is too old, else export the bundle again for this GPU"
        )

    def _check_names(self) -> None:
        """The aliases that an update in place relies on are the engine's own.

        TensorRT tells those of its own layers only; a plugin's are the plugin's word, checked when it is built.
        """
        if self.info.attention == "plugin":
            return
        for name, engine in self._engines.items():
            for i in range(engine.num_io_tensors):
                output = engine.get_tensor_name(i)
                past = output.replace("present_", "past_", 1)
                if output.startswith("present_") and engine.get_aliased_input_tensor(output) != past:
                    raise BundleError(
                        f"{name} does not update {past} in place; export the bundle again with this version"
                    )

    def context(self, profile: EngineProfile, eager: bool) -> Any:
        """A context on a profile, over the shared activations.

        Args:
            eager: make the kernels of a shape before its first run; a captured graph keeps what it ran with.
        """
        trt, engine = self.trt, self._engines[profile.file]
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(engine, "create_runtime_config"):  # TensorRT-RTX, which makes kernels for this GPU now
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if profile.file not in self._kernels:
                capability = self.cuda.capability()
                self._kernels[profile.file] = KernelCache(config, self._hashes[profile.file], capability)
            config.set_runtime_cache(self._kernels[profile.file].cache)
            kinds = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if eager else kinds.LAZY
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        context.set_device_memory(self.activations, self.activation_bytes)
        if not context.set_optimization_profile_async(profile.index, self.cuda.stream):
            raise BundleError(f"{profile.file} has no profile {profile.index}; export the bundle again")
        return context

    def close(self) -> None:
        for kernels in self._kernels.values():
            kernels.save()
        self._kernels.clear()
        self._engines.clear()
        self._runtime = None


def _errors_of(trt: Any) -> Any:
    class Errors(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages.append(message)

    return Errors()


class _Run:
    """One context with its inputs and its output: a block each, on the device and pinned on the host."""

    def __init__(
        self,
        engines: _Engines,
        profile: EngineProfile,
        manifest: Manifest,
        rows: int,
        bound: Bound,
    ) -> None:
        self._cuda, self._manifest = engines.cuda, manifest
        self._context = engines.context(profile, eager=profile.name == "decode")
        self._names = {spec.name for spec in manifest.inputs}
        self._graph: Any = None
        self._steps = 0
        largest = {name: values[2] for name, values in profile.axes.items()} | {"batch": rows}
        self._places: dict[str, tuple[int, np.dtype[Any]]] = {}
        size = 0
        for spec in manifest.inputs:
            if not spec.name.startswith("past_key_values.") and spec.name != COUNTERS:
                dtype = np.dtype(NUMPY_TYPES[spec.dtype])
                self._places[spec.name] = size, dtype
                count = int(np.prod([largest[a] if isinstance(a, str) else a for a in spec.shape]))
                size += -(-count * dtype.itemsize // ADDRESS_STEP) * ADDRESS_STEP
        self._output = manifest.outputs[0]
        count = int(np.prod([largest[a] if isinstance(a, str) else a for a in self._output.shape]))
        self._staged, self._inputs = self._cuda.allocate_pinned(size), self._cuda.allocate(size)
        self._fetched, self._result = self._cuda.allocate_pinned(4 * count), self._cuda.allocate(4 * count)
        self._bind(self._output.name, self._result)
        for name, (offset, _) in self._places.items():
            self._bind(name, self._inputs + offset)
        self._bind_all(bound)

    def run(self, arrays: dict[str, npt.NDArray[Any]], bound: Bound) -> Logits:
        """Run with inputs of any shape within the profile, on the cache's rows."""
        self._bind_all(bound)
        self._stage(arrays)
        fetched, shape = self._outcome(arrays)
        self._enqueue(fetched)
        self._cuda.synchronize()
        return fetched.view(np.float32).reshape(shape)

    def step(self, arrays: dict[str, npt.NDArray[Any]]) -> Logits:
        """Run with inputs of the one shape that this context has; the second time records, later ones replay."""
        fetched, shape = self._outcome(arrays)
        self._stage(arrays, fixed=self._steps > 0)
        if self._graph is None and self._steps > 0 and self._capturable():
            self._graph = self._cuda.capture(lambda: self._enqueue(fetched))
        if self._graph is None:
            self._enqueue(fetched)
        else:
            self._cuda.launch(self._graph)
        self._cuda.synchronize()
        self._steps += 1
        return fetched.view(np.float32).reshape(shape)

    def close(self) -> None:
        if self._graph is not None:
            self._cuda.destroy(self._graph)
            self._graph = None

    def _capturable(self) -> bool:
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._cuda.stream))

    def _stage(self, arrays: dict[str, npt.NDArray[Any]], fixed: bool = False) -> None:
        for name, array in arrays.items():
            offset, dtype = self._places[name]
            flat = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)
            self._staged[offset : offset + flat.nbytes] = flat
            if not fixed:
                self._shape(name, array.shape)

    def _outcome(self, arrays: dict[str, npt.NDArray[Any]]) -> tuple[Bytes, tuple[int, ...]]:
        """The part of the pinned output that this run fills, and its shape."""
        axes: dict[str, int] = {}
        for spec in self._manifest.inputs:
            if spec.name in arrays:
                axes |= {str(a): n for a, n in zip(spec.shape, arrays[spec.name].shape, strict=True)}
        shape = tuple(axes[a] if isinstance(a, str) else a for a in self._output.shape)
        return self._fetched[: 4 * int(np.prod(shape))], shape

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
