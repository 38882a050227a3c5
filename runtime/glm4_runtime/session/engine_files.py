"""Loads the engine files of a bundle, with TensorRT or TensorRT-RTX; the manifest chooses the class."""

import mmap
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from glm4_runtime.bundle import EngineInfo, EngineProfile, Manifest
from glm4_runtime.errors import BundleError, UnavailableError, some
from glm4_runtime.session.cuda_device import Cuda
from glm4_runtime.session.kernel_cache import KernelCache

# TensorRT's names of a manifest's element types.
TENSORRT_TYPES = {
    "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "float8e4m3fn": "FP8", "int8": "INT8", "int32": "INT32",
    "int64": "INT64",
}  # fmt: skip
CUDA_GRAPH = "CUDA graph"  # the key in ``skipped`` for the reason why a session records none
# What to do on a GPU that an engine does not support.
ELSEWHERE = "export the checkpoint with --target tensorrt on this host, or with --target ort --precision fp16"


def load_tensorrt(info: EngineInfo) -> Any:
    """Import the TensorRT that an engine was built by, of the same version.

    Raises:
        UnavailableError: it is missing or has another version; says what to install or to export.
    """
    name = ENGINES_OF_KIND[info.kind].module
    try:
        trt = import_module(name)
    except ImportError as error:
        raise UnavailableError(
            f"{name} cannot be imported ({error}); install {info.kind}=={info.version}"
            f"{ENGINES_OF_KIND[info.kind].where}"
        ) from error
    if trt.__version__ != info.version:
        raise UnavailableError(
            f"the engine was built by {info.kind} {info.version} and {trt.__version__} is installed; "
            f"install {info.kind}=={info.version}, or export the bundle again with {trt.__version__}"
        )
    return trt


def require_capability(
    manifest: Manifest, info: EngineInfo, found: str, named: Collection[str] | None
) -> None:
    """Refuse a GPU that the engine was not built for.

    Args:
        found: compute capability of the GPU, as 89 for 8.9.
        named: capabilities that this TensorRT has kernels for; None if it builds for the GPU that it runs on.

    Raises:
        UnavailableError: says what to export for this GPU.
    """
    if named is not None and found not in named:
        known = ", ".join(sorted(named, key=int))
        raise UnavailableError(
            f"{info.kind} {info.version} has no kernels for compute capability {found}, which this GPU has; "
            f"it has them for {known}. To use this GPU, {ELSEWHERE}"
        )
    built_for = manifest.compute_capabilities
    newest = max(map(int, built_for))
    if found in built_for or (info.later_gpus and int(found) > newest):
        return
    option = f" --sm {found}" if named is not None else " on this host"
    raise UnavailableError(
        f"the engine was built for compute capability {', '.join(built_for)}"
        f"{' and later' if info.later_gpus else ''} and this GPU has {found}; "
        f"export the bundle again for {info.kind}{option}"
    )


class Engines:
    """The loaded engine files of a bundle, and the memory for activations that their contexts share.

    This class uses the Python names that both TensorRTs have.

    Args:
        skipped: receives the reason if a step cannot be recorded as a CUDA graph.
    """

    module: ClassVar[str] = "tensorrt"
    where: ClassVar[str] = " from NVIDIA's package index, which its TensorRT installation guide names"

    def __init__(
        self, trt: Any, folder: Path, manifest: Manifest, cuda: Cuda, skipped: dict[str, str]
    ) -> None:
        assert manifest.engine is not None
        self.trt, self.info, self.cuda, self.skipped = trt, manifest.engine, cuda, skipped
        require_capability(manifest, self.info, cuda.capability(), self.named_capabilities(trt))
        self.hashes = {name: entry.sha256 for name, entry in manifest.files.items()}
        self._log = _errors_of(trt)
        self._runtime = trt.Runtime(self._log)
        files = dict.fromkeys(profile.file for profile in self.info.profiles)
        self._engines = {name: self._load(folder / name) for name in files}
        for name, engine in self._engines.items():
            self._check_tensors(name, engine, manifest)
        self._check_names()
        self.activation_bytes = max(engine.device_memory_size_v2 for engine in self._engines.values())
        self.activations = cuda.allocate(self.activation_bytes)

    @staticmethod
    def named_capabilities(trt: Any) -> frozenset[str] | None:  # noqa: ARG004 - the other kind asks it
        """Compute capabilities that this TensorRT supports; None if it builds for the GPU of this machine."""
        return None

    def _load(self, path: Path) -> Any:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._require_validity(path, data)
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._refusal(path, next(iter(self._log.messages), "it does not say why"))
        return engine

    def _require_validity(self, path: Path, data: Any) -> None:
        """Full TensorRT checks this while it loads."""

    def _refusal(self, path: Path, reason: str) -> BundleError:
        return BundleError(
            f"{self.info.kind} {self.info.version} cannot load {path} on this GPU: {' '.join(reason.split())}; "
            "update the driver where it is too old, else export the bundle again for this GPU"
        )

    def _check_tensors(self, file: str, engine: Any, manifest: Manifest) -> None:
        """Check the names and types of inputs and outputs against the manifest. Shapes are checked when bound."""
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {(name, engine.get_tensor_mode(name), engine.get_tensor_dtype(name)) for name in names}
        wanted = {
            (spec.name, mode, getattr(self.trt.DataType, TENSORRT_TYPES[spec.dtype]))
            for mode, specs in (
                (self.trt.TensorIOMode.INPUT, manifest.inputs),
                (self.trt.TensorIOMode.OUTPUT, manifest.outputs),
            )
            for spec in specs
        }
        differs = sorted({name for name, *_ in found ^ wanted})
        if differs:
            raise BundleError(
                f"{file} has other inputs and outputs than the manifest ({some(differs)}); export the bundle again"
            )

    def _check_names(self) -> None:
        """Check that the engine declares the aliases for updates in place.

        TensorRT reports aliases of its own layers only. A plugin's aliases are checked when the engine is built.
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
        """A context for a profile, with the shared activations.

        Args:
            eager: compile the kernels of a shape before its first run, because a captured graph keeps its kernels.
        """
        context = self._new_context(profile.file, eager)
        context.set_device_memory(self.activations, self.activation_bytes)
        if not context.set_optimization_profile_async(profile.index, self.cuda.stream):
            raise BundleError(f"{profile.file} has no profile {profile.index}; export the bundle again")
        return context

    def _new_context(self, file: str, eager: bool) -> Any:  # noqa: ARG002 - its kernels are in the engine
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._engines[file].create_execution_context(strategy)

    def capturable(self, context: Any) -> bool:  # noqa: ARG002 - a capture that fails tells
        """Whether a run of ``context`` can be recorded, as far as known."""
        return CUDA_GRAPH not in self.skipped

    def close(self) -> None:
        self._engines.clear()
        self._runtime = None


class RtxEngines(Engines):
    """TensorRT-RTX. It compiles kernels for the GPU at run time, and this class saves them for the next session."""

    module = "tensorrt_rtx"
    where = ""

    def __init__(
        self, trt: Any, folder: Path, manifest: Manifest, cuda: Cuda, skipped: dict[str, str]
    ) -> None:
        self._kernels: dict[str, KernelCache] = {}
        super().__init__(trt, folder, manifest, cuda, skipped)

    @staticmethod
    def named_capabilities(trt: Any) -> frozenset[str] | None:
        names = trt.ComputeCapability.__members__
        return frozenset(name.removeprefix("SM") for name in names if name.startswith("SM"))

    def _require_validity(self, path: Path, data: Any) -> None:
        """TensorRT-RTX can report problems before it loads."""
        validity, reasons = self._runtime.get_engine_validity(data)
        if validity == self.trt.EngineValidity.INVALID:
            known = self.trt.EngineInvalidityDiagnostics.__members__.items()
            names = [name.lower().replace("_", " ") for name, bit in known if int(bit) & int(reasons)]
            raise self._refusal(path, ", ".join(names) or next(iter(self._log.messages), "no reason given"))

    def _new_context(self, file: str, eager: bool) -> Any:
        config = self._engines[file].create_runtime_config()
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config.set_execution_context_allocation_strategy(strategy)
        if file not in self._kernels:
            self._kernels[file] = KernelCache(config, self.hashes[file], self.cuda.capability())
        config.set_runtime_cache(self._kernels[file].cache)
        kinds = self.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if eager else kinds.LAZY
        return self._engines[file].create_execution_context(config)

    def capturable(self, context: Any) -> bool:
        return super().capturable(context) and bool(context.is_stream_capturable(self.cuda.stream))

    def close(self) -> None:
        for kernels in self._kernels.values():
            kernels.save()
        self._kernels.clear()
        super().close()


def _errors_of(trt: Any) -> Any:
    class Errors(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages.append(message)

    return Errors()


ENGINES_OF_KIND: dict[str, type[Engines]] = {"tensorrt-rtx": RtxEngines, "tensorrt": Engines}
