"""The manifest of a bundle, as frozen dataclasses and as ``manifest.json``."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from glm4_runtime.bundle.file_names import GRAPH, MANIFEST, WEIGHTS
from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.errors import BundleError, one_line, shown, some

SCHEMA_VERSION = 1
MOST_MANIFEST_BYTES = 16 << 20  # of a manifest; that of 61 layers takes 40 KB
EXPORT_AGAIN = "export the bundle again"


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. ``shape`` has numbers, and names for axes that vary between calls."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class FileEntry:
    """
    Attributes:
        sample: SHA-256 of the blocks that every opening reads, for a file larger than ``files.SMALL_FILE``; see
            :func:`~glm4_runtime.bundle.files.sample_of`. None in older bundles.
    """

    sha256: str
    bytes: int
    sample: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """The facts about the model that serving needs; :attr:`Manifest.config` has the whole configuration."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """The limits of the bundle: positions per slot, and rows of one decode step."""

    max_seq_len: int
    max_batch_size: int


@dataclass(frozen=True)
class AdapterInfo:
    """A LoRA adapter that was merged into the weights.

    Attributes:
        name: of its folder.
        sha256: of its configuration and its tensors.
        scale: the factor by which it was merged, beside its own.
    """

    name: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class AdapterSlots:
    """The LoRA adapters that a session can load at run time.

    Attributes:
        count: maximum number of loaded adapters.
        rank: maximum rank of an adapter.
        matrices: shapes [outputs, inputs] of the matrices that adapters may change, by name without ``.weight``.
        base: name of the released model in lower case, if the checkpoint's folder had such a name.
    """

    count: int
    rank: int
    matrices: Mapping[str, tuple[int, ...]]
    base: str | None = None


# Input and output of an engine with our plugin, bound to one address; zero before and after each run.
COUNTERS, PRESENT_COUNTERS = "counters", "present_counters"


@dataclass(frozen=True)
class EngineProfile:
    """A profile of an engine: ``prefill``, ``decode`` or ``encode``.

    Attributes:
        file, index: the engine file, and the profile's number in it.
        axes: minimum, optimum and maximum of every named axis of the manifest's inputs.
    """

    name: str
    file: str
    index: int
    axes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StageInfo:
    """One stage of a model in several graphs or engines: consecutive layers, in files of its own.

    Attributes:
        first_layer, layers: number of its first layer, and count of its layers.
        graph, weights: the names of its ONNX files. With an engine, these files may be deleted.
        profiles: of its engine; empty for ONNX.
    """

    first_layer: int
    layers: int
    graph: str
    weights: str
    profiles: tuple[EngineProfile, ...] = ()

    @property
    def files(self) -> frozenset[str]:
        """The names of all its files."""
        return frozenset({self.graph, self.weights, *self.data_files})

    @property
    def data_files(self) -> tuple[str, ...]:
        """The names of the files that hold its weights: engines, or the data of the ONNX graph."""
        return tuple(dict.fromkeys(profile.file for profile in self.profiles)) or (self.weights,)


@dataclass(frozen=True)
class EngineInfo:
    """The description of a TensorRT engine.

    Attributes:
        kind: ``tensorrt-rtx`` or ``tensorrt``; ``version`` is that of the builder, which the runtime must match.
        layout: ``shared``, one engine of all profiles, or ``split``, one for each.
        later_gpus: the engine also runs on GPUs newer than the manifest's compute capabilities.
        attention: ``native`` or ``plugin``; ``plugin_version`` of the latter.
        profiles: see :class:`EngineProfile`. Empty for a bundle of stages: each stage has its own.
        layers: number of layers by type in the parsed network, or in those of all stages.
        float32: number of nodes that always compute in float32, by operator.
        built_from: size and hash of the ONNX graph and weights, which may be deleted.
    """

    kind: str
    version: str
    layout: str
    later_gpus: bool
    attention: str
    plugin_version: str | None
    profiles: tuple[EngineProfile, ...]
    layers: Mapping[str, int]
    float32: Mapping[str, int]
    built_from: Mapping[str, FileEntry]


@dataclass(frozen=True)
class Manifest:
    """All facts that a runtime needs before it loads weights.

    Attributes:
        task: ``causal-lm``, ``sequence-classification``, ``token-classification`` or ``encoder``.
        target: the target of the export: ``ort``, ``cpu``, ``native``, ``tensorrt-rtx`` or ``tensorrt``.
        dialect: the set of operators of the graph, or the kind of the engine; decides which session opens it.
        precision: the precision's name; ``tensor_precisions`` has the format of each group.
        activations, kv_cache: element types of activations and of the cache (None without a cache).
        providers: ONNX Runtime execution providers that have every kernel the graph needs.
        pooling: how an encoder's ``last_hidden_state`` becomes one vector.
        compute_capabilities: GPUs that an engine runs on, such as 89 for 8.9; empty for ONNX.
        engine: the engine's description; None for ONNX.
        scaled_bits: k by norm: its input is scaled by 2^-k to prevent overflow in fp16, and its eps by 2^-2k.
        tools: versions of all tools that determine the bundle.
        source_sha256: digest of the checkpoint's tensors: SHA-256 over one line per tensor, sorted by
            name, of name, element type, shape and the SHA-256 of its bytes; with adapters of the merged values.
        adapters: in the order in which they were merged.
        adapter_slots: None: the bundle takes no adapters at run time.
        stages: the parts of the model in their order; empty if one graph has all layers. ``inputs`` and ``outputs`` are
            those of the whole model; :func:`~glm4_runtime.bundle.graph_io.stage_io` gives those of a stage.
    """

    task: str
    target: str
    dialect: str
    precision: str
    activations: str
    kv_cache: str | None
    model: ModelInfo
    limits: Limits
    opsets: Mapping[str, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    providers: tuple[str, ...]
    tensor_precisions: Mapping[str, str]
    tools: Mapping[str, str]
    config: Mapping[str, Any]
    source_sha256: str
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    pooling: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    engine: EngineInfo | None = None
    scaled_bits: Mapping[str, int] = field(default_factory=dict)
    adapters: tuple[AdapterInfo, ...] = ()
    adapter_slots: AdapterSlots | None = None
    stages: tuple[StageInfo, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The names of the files that hold weights of ONNX graphs."""
        return tuple(stage.weights for stage in self.stages) or (WEIGHTS,)

    @property
    def graph_files(self) -> tuple[str, ...]:
        """The names of the ONNX graphs that together are the model."""
        return tuple(stage.graph for stage in self.stages) or (GRAPH,)

    @property
    def engine_files(self) -> tuple[str, ...]:
        """The names of the TensorRT engines; empty for ONNX."""
        if self.engine is None:
            return ()
        of_stages = (name for stage in self.stages for name in stage.data_files)
        return tuple(dict.fromkeys([*(profile.file for profile in self.engine.profiles), *of_stages]))

    @property
    def may_use_gpu(self) -> bool:
        """Whether the bundle can run on a GPU: as an engine, or by another provider than the CPU's."""
        return self.engine is not None or bool(set(self.providers) - {"CPUExecutionProvider"})


T = TypeVar("T")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Build ``kind``, a type of the dataclasses above, from JSON; refuse values that do not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, value, where)
    if kind is Any:
        return value
    if origin is types.UnionType:
        if value is None and types.NoneType in arguments:
            return None
        wanted = tuple(a for a in arguments if a is not types.NoneType)
        if len(wanted) == 1 and dataclasses.is_dataclass(wanted[0]):
            return _decode(wanted[0], value, where)
        if isinstance(value, wanted) and not isinstance(value, bool):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    elif origin is Mapping:
        if isinstance(value, dict):
            return {k: _decode(arguments[1], v, f"{where}.{one_line(k, 80)}") for k, v in value.items()}
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise BundleError(
        f"{MANIFEST}: {where} is {shown(value)}, not {getattr(kind, '__name__', kind)}; {EXPORT_AGAIN}"
    )


def _decode_dataclass(kind: type[T], value: Any, where: str) -> T:
    if not isinstance(value, dict):
        raise BundleError(f"{MANIFEST}: {where} is not an object; {EXPORT_AGAIN}")
    hints = typing.get_type_hints(kind)
    required = {
        f.name
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing, unknown = sorted(required - value.keys()), sorted(value.keys() - hints.keys())
    if missing or unknown:
        what = [f"lacks {some(missing)}"] * bool(missing) + [f"has unknown {some(unknown)}"] * bool(unknown)
        raise BundleError(f"{MANIFEST}: {where} {' and '.join(what)}; {EXPORT_AGAIN}")
    return kind(**{name: _decode(hints[name], v, f"{where}.{name}") for name, v in value.items()})


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        BundleError: no bundle there, a manifest that is damaged or contradicts itself, or one of another schema
            version.
    """
    from glm4_runtime.bundle.manifest_checks import check_manifest

    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        reason = (
            "no such folder"
            if not folder.exists()
            else "not a folder"
            if not folder.is_dir()
            else f"no {MANIFEST} in it"
        )
        raise BundleError(
            f"{folder} is not a bundle ({reason}); make one with: glm4-deploy export CHECKPOINT {folder}"
        )
    data = read_object(path, BundleError, EXPORT_AGAIN, MOST_MANIFEST_BYTES)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {shown(version)}, this glm4-deploy reads {SCHEMA_VERSION}; "
            "export the bundle again, or install the version that wrote it"
        )
    manifest: Manifest = _decode_dataclass(Manifest, data, "manifest")
    check_manifest(manifest)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", "utf-8")
