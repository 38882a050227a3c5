"""The session for ONNX Runtime. The cache has one buffer for keys and one for values per layer, each bound as past
and as present."""

import functools
import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from glm4_runtime.bundle import GRAPH, Manifest
from glm4_runtime.bundle.adapter_inputs import PACKED_DIALECT, ROWS
from glm4_runtime.bundle.ascii_path import ascii_path
from glm4_runtime.bundle.file_names import ADAPTER_GRAPH
from glm4_runtime.errors import BundleError, ModelError, UnavailableError
from glm4_runtime.install import install_command
from glm4_runtime.kv_cache import Move
from glm4_runtime.session.adapters import AdapterTable, make_table
from glm4_runtime.session.base import Ids, Logits
from glm4_runtime.session.bound_rows import BoundRows
from glm4_runtime.session.growing import GrowingSession
from glm4_runtime.session.memory import CacheMemory, HostMemory

if TYPE_CHECKING:
    from glm4_runtime.session.ort_cuda import OrtCuda

PLUGINS_PACKAGE, OPERATOR_LIBRARY = "glm4_plugins", "cpu_operators"
OPERATOR_DOMAIN = "glm4"  # of those operators, in graphs
# The providers that this session supports, fastest first.
CPU_PROVIDER = "CPUExecutionProvider"
PROVIDERS = ("CUDAExecutionProvider", CPU_PROVIDER)
# Why a manifest does not list a provider.
MISSING_KERNELS = {
    ("CPUExecutionProvider", "bfloat16"): "it has no bfloat16 kernels",
    ("CUDAExecutionProvider", "float32"): "its GroupQueryAttention takes float16 and bfloat16 only",
    ("CUDAExecutionProvider", "int8"): "its int8 KV cache has not been proved",
}


def cores() -> int:
    """Number of cores that this process may use; all cores if the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_onnxruntime() -> Any:
    """Import onnxruntime, or name the extra that installs it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError(
            f"onnxruntime cannot be imported ({error}); run {install_command('cpu')}, or with [cuda] on a GPU host"
        ) from error
    return onnxruntime


def operator_library() -> Path:
    """The path of our operators for ONNX Runtime, in the package ``glm4_plugins``, which is located but not imported.

    Raises:
        UnavailableError: it was not built, because there was no C++ compiler during the installation.
    """
    spec = find_spec(PLUGINS_PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or ()
    for folder in folders:
        for suffix in reversed(EXTENSION_SUFFIXES):  # first the plain one, which builds give it
            path = Path(folder) / f"{OPERATOR_LIBRARY}{suffix}"
            if path.is_file():
                return path
    raise UnavailableError(
        f"the CPU operators of {PLUGINS_PACKAGE} were not built when glm4-deploy was installed; install a C++ compiler "
        "and glm4-deploy again, or export with --target ort"
    )


def choose_provider(
    manifest: Manifest, available: Sequence[str], asked: str | None
) -> tuple[str, dict[str, str]]:
    """The provider to run on, and why each one before it was skipped.

    Raises:
        BundleError: no provider fits, or not the requested one.
    """

    def reason(name: str) -> str | None:
        if manifest.stages and name != CPU_PROVIDER:
            return "stages run on the CPU only"
        if name not in manifest.providers:
            known = (MISSING_KERNELS.get((name, str(t))) for t in (manifest.activations, manifest.kv_cache))
            lacks = next(filter(None, known), "it lacks kernels that the graph needs")
            return f"the bundle is {manifest.precision} for {manifest.target}, and {lacks}"
        if name not in available:
            return "the installed onnxruntime does not have it"
        return None

    if asked is not None:
        why = reason(asked)
        if why is not None:
            raise BundleError(
                f"{asked} cannot run this bundle: {why}. It runs on: {_or_none(manifest.providers)}"
            )
        return asked, {}
    skipped: dict[str, str] = {}
    for name in PROVIDERS:
        why = reason(name)
        if why is None:
            return name, skipped
        skipped[name] = why
    reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
    raise UnavailableError(
        f"no ONNX Runtime provider here can run this bundle ({reasons}). It runs on: {_or_none(manifest.providers)}; "
        "export with another --precision for this machine"
    )


def _or_none(names: Sequence[str]) -> str:
    return ", ".join(names) or "none of ONNX Runtime's providers"


def _gpu_of(ort: Any) -> "OrtCuda":
    from glm4_runtime.session.ort_cuda import OrtCuda  # not needed for the CPU

    return OrtCuda(ort)


def failed_step(error: Exception) -> ModelError:
    """What a kernel's error becomes. onnxruntime's exceptions have no common base class."""
    return ModelError(f"a step of the model failed in ONNX Runtime: {error}")


def operators_of(manifest: Manifest) -> Path | None:
    """The path of our operators, if the graph needs them."""
    return operator_library() if OPERATOR_DOMAIN in manifest.opsets else None


def kernels_of(ort: Any, manifest: Manifest, provider: str) -> dict[str, str]:
    """The versions of everything that computes keys and values."""
    operators = operators_of(manifest)
    digest = operators and hashlib.sha256(operators.read_bytes()).hexdigest()
    return {"provider": provider, "onnxruntime": ort.__version__, "operators": digest or ""}


def session_options(ort: Any, manifest: Manifest, threads: int | None) -> Any:
    """Options for the graphs of a bundle, with our operators if the graphs need them.

    Raises:
        BundleError: the operators cannot be loaded.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.log_severity_level = 3  # errors only; the cases of its warnings are decided by choose_provider
    library = operators_of(manifest)
    try:
        if library is not None:
            with ascii_path(library) as path:
                options.register_custom_ops_library(path)
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise BundleError(f"ONNX Runtime {ort.__version__} cannot load {library}: {error}") from error
    return options


@dataclass(frozen=True)
class Graphs:
    """Opens graphs of a bundle, all with the same options."""

    ort: Any
    folder: Path
    options: Any
    provider: Any

    def open(self, name: str) -> Any:
        """Raises :class:`BundleError`."""
        try:
            with warnings.catch_warnings(), ascii_path(self.folder / name) as path:
                warnings.simplefilter("ignore")
                return self.ort.InferenceSession(path, self.options, providers=[self.provider])
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise BundleError(
                f"ONNX Runtime {self.ort.__version__} cannot open {self.folder / name}: {error}"
            ) from error


class OrtSession(GrowingSession):
    """A bundle that is an ONNX graph, on ONNX Runtime."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        max_seq_len: int,
        max_batch_size: int,
        *,
        provider: str | None,
        threads: int | None,
    ) -> None:
        super().__init__(folder, manifest, max_seq_len, max_batch_size)
        ort = load_onnxruntime()
        self.provider, self.skipped = choose_provider(manifest, ort.get_available_providers(), provider)
        self._gpu = None if self.provider == CPU_PROVIDER else _gpu_of(ort)
        try:
            self._open(ort, threads)
        except BaseException:
            if self._gpu is not None:
                self._gpu.close()
            raise

    def _open(self, ort: Any, threads: int | None) -> None:
        manifest, gpu = self.manifest, self._gpu
        options = session_options(ort, manifest, threads)
        provider: Any = self.provider
        if gpu is not None:
            provider = (self.provider, gpu.provider_options())
            for key, value in gpu.configuration(manifest).items():
                options.add_session_config_entry(key, value)
        self._graphs = Graphs(ort, self.folder, options, provider)
        self._session = self._graphs.open(GRAPH)
        if self._session.get_providers()[0] != self.provider:
            missing = gpu.missing[:200] if gpu is not None else ""
            raise BundleError(
                f"{self.provider} is installed but did not start here ({missing or 'the driver is too old'}); "
                f"run {install_command('cuda')}, then glm4-deploy doctor; or ask for CPUExecutionProvider"
            )
        if manifest.kv_cache is not None:
            self._cache = self._new_cache()
        self._bindings: dict[tuple[int, int, bool], BoundRows] = {}
        self._table: AdapterTable | None = None  # None: no adapter is loaded
        self._adapted: Any = None  # the graph with adapters
        self.adapter_runs = 0

    def _new_cache(self) -> CacheMemory:
        if self._gpu is None:
            return HostMemory(self.manifest, self.max_batch_size)
        from glm4_runtime.session.cuda_memory import CudaMemory

        self._gpu.allocate_logits(self.max_batch_size, self.manifest.model.vocab_size)
        return CudaMemory(self.manifest, self.max_batch_size, self._gpu.cuda)

    def _new_logits(self, positions: tuple[int, int]) -> Logits:
        shape = (*positions, self.manifest.model.vocab_size)
        return np.empty(shape, np.float32) if self._gpu is None else self._gpu.new_logits(shape)

    def _run_decoder(self, first_row: int, ids: Ids, past: Sequence[int], logits_indices: Ids) -> Logits:
        numbers = None if self._table is None else self._adapter_rows(self._table, first_row, len(ids))
        session, rows = self._session, self._bound_rows(first_row, len(ids), numbers is not None)
        logits = rows.write(ids, past, logits_indices)
        if numbers is not None:
            session = self._adapted
            rows.adapters[ROWS][:] = numbers
            self.adapter_runs += 1
        try:  # no context manager, which costs three calls a token
            session.run_with_iobinding(rows.binding)
        except Exception as error:
            raise failed_step(error) from error
        if self._gpu is not None:
            self._gpu.cuda.synchronize()
        if logits.shape[1] > 1:  # logits of a whole prompt are large
            rows.forget()
        return logits

    def _bound_rows(self, first_row: int, count: int, adapted: bool) -> BoundRows:
        key = first_row, count, adapted
        if key not in self._bindings:
            device = "cpu" if self._gpu is None else "cuda"
            adapters: dict[str, Any] = {}
            if adapted and self._table is not None:
                adapters = {ROWS: np.empty(count, np.int64), **self._table.arrays}
            self._bindings[key] = BoundRows(
                (self._adapted if adapted else self._session).io_binding(),
                self._cache,
                first_row,
                count,
                device,
                self._new_logits,
                adapters,
            )
        return self._bindings[key]

    # Adapters --------------------------------------------------------------------------------

    @property
    def adapters(self) -> Sequence[str]:
        return () if self._table is None else self._table.names

    @property
    def adapter_bytes(self) -> int:
        return 0 if self._table is None else self._table.nbytes

    def load_adapter(self, name: str, folder: str | Path) -> None:
        slots = self.manifest.adapter_slots
        if slots is None:
            super().load_adapter(name, folder)
            return
        if self._gpu is not None:
            raise BundleError(f"{self.provider} runs no adapters; open the bundle with CPUExecutionProvider")
        table = self._table or make_table(self.manifest, slots)
        table.load(name, Path(folder))
        self._forget_adapted()
        if self._table is None:
            self._open_adapted()
            self._table = table

    def _open_adapted(self) -> None:
        """Open the graph with adapters. Where a session copies its weights, it replaces the graph without them."""
        if self._maps_weights:
            self._adapted = self._adapted or self._graphs.open(ADAPTER_GRAPH)
            return
        self._bindings.clear()
        self._session = None
        try:
            self._session = self._adapted = self._graphs.open(ADAPTER_GRAPH)
        except BaseException:
            self._session = self._graphs.open(GRAPH)
            raise

    def adapter_digest(self, name: str) -> str:
        self._require_adapter(name)
        assert self._table is not None
        return self._table.digests[name]

    def _unload_adapter(self, name: str) -> None:
        assert self._table is not None
        self._table.unload(name)
        self._forget_adapted()
        if self._table.names:
            return
        self._table = None
        if not self._maps_weights:
            self._session = self._adapted = None
            self._session = self._graphs.open(GRAPH)

    @property
    def _maps_weights(self) -> bool:
        """Whether our own products read the weights in the mapped file, so that a second graph needs no memory."""
        return self.manifest.dialect == PACKED_DIALECT

    def _forget_adapted(self) -> None:
        """Drop bindings to arrays of adapters, which may have changed."""
        self._bindings = {key: rows for key, rows in self._bindings.items() if not key[2]}

    def _adapter_rows(
        self, table: AdapterTable, first_row: int, count: int
    ) -> "npt.NDArray[np.int64] | None":
        """The adapter of each row. None: no row has one, and there is a graph without adapters."""
        slots = [self._slots.slot(row) for row in range(first_row, first_row + count)]
        names = [None if slot is None else self._adapter_of.get(slot) for slot in slots]
        if self._maps_weights and not any(names):
            return None
        return table.numbers(names)

    def _run_encoder(self, ids: Ids) -> Logits:
        lengths = np.array([ids.shape[1]], np.int32)
        try:
            result: Logits = self._session.run(None, {"input_ids": ids, "query_lengths": lengths})[0]
        except Exception as error:
            raise failed_step(error) from error
        return result

    # Positions on the host --------------------------------------------------------------------

    @functools.cached_property
    def kernels(self) -> dict[str, str]:
        return kernels_of(self._graphs.ort, self.manifest, self.provider)

    @property
    def copies_positions(self) -> bool:
        return self.manifest.kv_cache is not None and isinstance(self._cache, HostMemory)

    def _read_row(self, row: int, start: int, stop: int) -> "npt.NDArray[Any]":
        assert isinstance(self._cache, HostMemory)
        return self._cache.read(row, start, stop)

    def _write_row(self, row: int, start: int, block: "npt.NDArray[Any]") -> None:
        assert isinstance(self._cache, HostMemory)
        self._cache.write(row, start, block)

    def _move_row(self, move: Move) -> None:
        self._cache.move(move)

    def _clear_row(self, row: int) -> None:
        self._cache.clear(row)

    def _resize_cache(self, capacity: int) -> None:
        self._bindings.clear()
        self._cache.resize(capacity, self._slots.longest())

    def close(self) -> None:
        self._bindings.clear()
        if self.manifest.kv_cache is not None:
            self._cache.free()
        self._session = self._adapted = self._table = None
        if self._gpu is not None:
            self._gpu.close()
