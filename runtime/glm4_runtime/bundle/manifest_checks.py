"""Checks a manifest: known words, numbers in range, and inputs and outputs that follow from its numbers.

A session allocates and indexes with these numbers, and a manifest may come from anybody.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4_runtime.bundle.element_types import CALIBRATED_CACHES
from glm4_runtime.bundle.file_names import ADAPTER_GRAPH, GRAPH, MANIFEST, REPORT
from glm4_runtime.bundle.graph_io import CAPACITY, GraphIO, graph_io
from glm4_runtime.bundle.manifest import (
    COUNTERS,
    EXPORT_AGAIN,
    PRESENT_COUNTERS,
    AdapterSlots,
    EngineInfo,
    EngineProfile,
    Manifest,
    TensorSpec,
)
from glm4_runtime.errors import BundleError, shown, some

LARGEST_NUMBER = 2**31 - 1
MOST_COUNTERS = 2**20  # of the attention plugin: four for each processor of a GPU
MOST_LAYERS, MOST_ROWS, MOST_END_TOKENS, MOST_PROFILES = 10_000, 65_536, 1_000, 16
LONGEST_WORD = 255  # characters of a name
MOST_ADAPTERS, MOST_RANK, MOST_NAMES = 256, 1024, 100_000  # of adapters at run time
SHA256 = re.compile(r"[0-9a-f]{64}")
CAPABILITY = re.compile(r"[1-9][0-9]{1,2}")

TASKS = ("causal-lm", "sequence-classification", "token-classification", "encoder")
ACTIVATION_TYPES = ("float32", "float16", "bfloat16")
CACHES = (*ACTIVATION_TYPES, "int8")
ENGINE_CACHES = (*ACTIVATION_TYPES, *CALIBRATED_CACHES)
OWN_CACHES = (*ACTIVATION_TYPES, "int8-rows")  # of our attention on a CPU
ONNX_RUNTIME = "onnxruntime"
ONNX_DIALECTS, ENGINE_DIALECTS = ("ort", "cpu", "native"), ("tensorrt-rtx", "tensorrt")
# An engine's cache has the limit's length, rounded up to a multiple of this number of positions. Then each row of the
# cache is a multiple of 256 bytes, which TensorRT requires.
CAPACITY_STEP = 64

# The largest value of each number of the model and of the limits; the smallest is 1.
MOST = {
    "vocab_size": LARGEST_NUMBER,
    "hidden_size": LARGEST_NUMBER,
    "num_layers": MOST_LAYERS,
    "num_heads": LARGEST_NUMBER,
    "num_kv_heads": LARGEST_NUMBER,
    "head_dim": LARGEST_NUMBER,
    "max_positions": LARGEST_NUMBER,
    "max_seq_len": LARGEST_NUMBER,
    "max_batch_size": MOST_ROWS,
}
# Numbers of the model that the configuration contains too.
IN_CONFIG = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
PROFILES = {"causal-lm": {"prefill", "decode"}}  # of an engine; of the other tasks:
ENCODE = {"encode"}


def check_manifest(manifest: Manifest) -> None:
    """Refuse impossible and contradictory values.

    Raises:
        BundleError: naming the field, its value and the allowed values.
    """
    _check_words(manifest)
    _check_numbers(manifest)
    _check_model(manifest)
    _check_files(manifest)
    _check_adapter_slots(manifest, manifest.adapter_slots)
    if manifest.stages:
        _check_stages(manifest)
    if manifest.dialect in ENGINE_DIALECTS:
        _check_engine(manifest, manifest.engine)
    _check_io(manifest)


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise BundleError(f"{MANIFEST}: {complaint}; {EXPORT_AGAIN}")


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, f"{name} is {shown(value)}, but must be one of {', '.join(known)}")


def _require_number(name: str, value: int, low: int, high: int) -> None:
    _require(low <= value <= high, f"{name} is {shown(value)}, but must be {low} ... {high}")


def _check_words(manifest: Manifest) -> None:
    _require_one_of("task", manifest.task, TASKS)
    _require_one_of("activations", manifest.activations, ACTIVATION_TYPES)
    if manifest.kv_cache is not None:
        known = OWN_CACHES if manifest.dialect == "cpu" else CACHES
        _require_one_of("kv_cache", manifest.kv_cache, known if manifest.engine is None else ENGINE_CACHES)
    decoder = manifest.task == "causal-lm"
    _require(
        decoder == (manifest.kv_cache is not None),
        f"kv_cache is {shown(manifest.kv_cache)}, but task {manifest.task} has {'a' if decoder else 'no'} cache",
    )
    words = (manifest.target, manifest.dialect, manifest.precision, *manifest.providers, *manifest.opsets)
    long = [word for word in words if len(word) > LONGEST_WORD]
    _require(not long, f"{some(long)} is longer than {LONGEST_WORD} characters")
    _require(
        SHA256.fullmatch(manifest.source_sha256) is not None,
        f"source_sha256 is {shown(manifest.source_sha256)}, but must be 64 hexadecimal digits",
    )


def _check_numbers(manifest: Manifest) -> None:
    for part in ("model", "limits"):
        values = getattr(manifest, part)
        for name in MOST.keys() & vars(values).keys():
            _require_number(f"{part}.{name}", getattr(values, name), 1, MOST[name])
    for domain, version in manifest.opsets.items():
        _require_number(f"opsets.{domain or 'ai.onnx'}", version, 1, LARGEST_NUMBER)


def _check_model(manifest: Manifest) -> None:
    model, limits = manifest.model, manifest.limits
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads {model.num_heads} is not a multiple of model.num_kv_heads {model.num_kv_heads}",
    )
    _require(
        limits.max_seq_len <= model.max_positions,
        f"limits.max_seq_len is {limits.max_seq_len}, but the model has {model.max_positions} positions",
    )
    _require_number("the count of model.eos_token_ids", len(model.eos_token_ids), 1, MOST_END_TOKENS)
    for (
        token
    ) in model.eos_token_ids:  # an id beyond the vocabulary has no effect; small models keep the family's ids
        _require_number("model.eos_token_ids", token, 0, LARGEST_NUMBER)
    if model.pad_token_id is not None:
        _require_number("model.pad_token_id", model.pad_token_id, 0, model.vocab_size - 1)
    classifies = manifest.task.endswith("classification")
    _require(
        classifies == bool(model.labels),
        f"model.labels has {len(model.labels)} labels, but task {manifest.task} has {'some' if classifies else 'none'}",
    )
    for name, key in IN_CONFIG.items():
        said = manifest.config.get(key, getattr(model, name))
        _require(
            said == getattr(model, name),
            f"model.{name} is {getattr(model, name)}, but config.{key} is {shown(said)}",
        )


def _check_files(manifest: Manifest) -> None:
    if manifest.dialect in ONNX_DIALECTS and not manifest.stages:
        _require(GRAPH in manifest.files, f"files does not list {GRAPH}")
    for name, entry in manifest.files.items():
        plain = name == Path(name).name and name not in {MANIFEST, REPORT, "..", ".", ""}
        _require(
            plain and "\0" not in name and len(name.encode()) <= LONGEST_WORD,
            f"files lists {shown(name)}, which is not a plain file name",
        )
        _require_number(f"files.{name}.bytes", entry.bytes, 0, 2**63 - 1)
        for what in ("sha256", "sample"):
            digest = getattr(entry, what)
            _require(
                digest is None or SHA256.fullmatch(digest) is not None,
                f"files.{name}.{what} is {shown(digest)}, but must be 64 hexadecimal digits",
            )


def _check_adapter_slots(manifest: Manifest, slots: AdapterSlots | None) -> None:
    if slots is None:
        return
    _require(
        manifest.dialect in ONNX_DIALECTS and manifest.task == "causal-lm",
        f"there are adapter_slots, but task {manifest.task} in the dialect {shown(manifest.dialect)} takes no adapters",
    )
    _require(ADAPTER_GRAPH in manifest.files, f"files does not list {ADAPTER_GRAPH}")
    _require_number("adapter_slots.count", slots.count, 1, MOST_ADAPTERS)
    _require_number("adapter_slots.rank", slots.rank, 1, MOST_RANK)
    _require_number("the count of adapter_slots.matrices", len(slots.matrices), 1, MOST_NAMES)
    for name, shape in slots.matrices.items():
        _require(
            0 < len(name) <= LONGEST_WORD and len(shape) == 2,
            f"adapter_slots.matrices has {shown(name)} {shown(list(shape))}, which is no matrix",
        )
        for size in shape:
            _require_number(f"adapter_slots.matrices.{name}", size, 1, LARGEST_NUMBER)


def _check_stages(manifest: Manifest) -> None:
    """Stages must follow each other, have all layers together, and have files of their own."""
    _require(
        manifest.dialect in (*ONNX_DIALECTS, *ENGINE_DIALECTS)
        and manifest.task == "causal-lm"
        and manifest.adapter_slots is None,
        f"there are stages, but task {manifest.task} in the dialect {shown(manifest.dialect)}, or a bundle that takes "
        "adapters, has none",
    )
    has_engines = manifest.dialect in ENGINE_DIALECTS
    layers, names = 0, list[str]()
    for number, stage in enumerate(manifest.stages, 1):
        _require_number(f"stages.{number}.layers", stage.layers, 1, manifest.model.num_layers)
        _require_number(f"stages.{number}.first_layer", stage.first_layer, layers, layers)
        layers += stage.layers
        names += stage.data_files if has_engines else (stage.graph, stage.weights)
        _require(has_engines or not stage.profiles, f"stages.{number} has profiles, but no engine")
    _require(
        layers == manifest.model.num_layers,
        f"stages have {layers} layers together, but the model has {manifest.model.num_layers}",
    )
    missing = sorted(set(names) - manifest.files.keys())
    _require(not missing, f"files does not list {some(missing)}")
    _require(len(set(names)) == len(names), "two stages have a file in common")


# Engines ------------------------------------------------------------------------------------------


def _check_engine(manifest: Manifest, engine: EngineInfo | None) -> None:
    _require(engine is not None, f"dialect is {manifest.dialect}, but there is no engine")
    assert engine is not None
    _require_one_of("engine.kind", engine.kind, (manifest.dialect,))
    _require_one_of("engine.attention", engine.attention, ("native", "plugin"))
    _require(not (manifest.stages and engine.profiles), "engine.profiles are those of no stage")
    of_stages = {f"stages.{number}": stage.profiles for number, stage in enumerate(manifest.stages, 1)}
    for where, profiles in (of_stages or {"engine": engine.profiles}).items():
        _check_profiles(manifest, f"{where}.profiles", profiles)
    good = [c for c in manifest.compute_capabilities if CAPABILITY.fullmatch(c)]
    _require(
        len(good) == len(manifest.compute_capabilities) > 0,
        f"compute_capabilities are {shown(list(manifest.compute_capabilities))}, but must be GPUs as 89 for 8.9",
    )


def _check_profiles(manifest: Manifest, where: str, profiles: tuple[EngineProfile, ...]) -> None:
    names = [profile.name for profile in profiles]
    needed = PROFILES.get(manifest.task, ENCODE)
    _require(
        len(names) == len(needed) and set(names) == needed,
        f"{where} are {shown(names)}, but task {manifest.task} needs {', '.join(sorted(needed))}",
    )
    axes = {axis for spec in manifest.inputs for axis in spec.shape if isinstance(axis, str)}
    for profile in profiles:
        _check_profile(manifest, f"{where}.{profile.name}", profile, axes)


def _check_profile(manifest: Manifest, where: str, profile: EngineProfile, axes: set[str]) -> None:
    _require(profile.file in manifest.files, f"files does not list the engine {shown(profile.file)}")
    _require_number(f"{where}.index", profile.index, 0, MOST_PROFILES)
    missing = sorted(axes - profile.axes.keys())
    _require(not missing, f"{where}.axes lacks {some(missing)}")
    for axis, values in profile.axes.items():
        ordered = len(values) == 3 and 1 <= values[0] <= values[1] <= values[2] <= LARGEST_NUMBER
        _require(
            ordered, f"{where}.axes.{axis} is {shown(list(values))}, but must be minimum, optimum and maximum"
        )


# Inputs and outputs -------------------------------------------------------------------------------


def _check_io(manifest: Manifest) -> None:
    expected = expected_io(manifest)
    for side in ("inputs", "outputs"):
        complaint = difference(getattr(manifest, side), getattr(expected, side))
        _require(
            complaint is None, f"{side} do not follow from task, model, kv_cache and limits: {complaint}"
        )


def expected_io(manifest: Manifest) -> GraphIO:
    """The inputs and outputs that follow from a manifest's numbers."""
    engine = manifest.engine if manifest.dialect in ENGINE_DIALECTS else None
    capacity: int | str = CAPACITY
    if engine is not None and manifest.kv_cache is not None:
        capacity = -(-manifest.limits.max_seq_len // CAPACITY_STEP) * CAPACITY_STEP
    io = graph_io(manifest.task, manifest.model, str(manifest.kv_cache), capacity)
    if engine is None or engine.attention != "plugin":
        return io
    count = _counters(manifest)
    return GraphIO(
        (*io.inputs, TensorSpec(COUNTERS, "int32", count)),
        (*io.outputs, TensorSpec(PRESENT_COUNTERS, "int32", count)),
    )


def _counters(manifest: Manifest) -> tuple[int]:
    """Number of the plugin's counters, from the input itself, because it depends on the GPU's processors."""
    for spec in manifest.inputs:
        if spec.name == COUNTERS and len(spec.shape) == 1:
            (count,) = spec.shape
            if isinstance(count, int) and 1 <= count <= MOST_COUNTERS:
                return (count,)
    return (1,)


def difference(said: tuple[TensorSpec, ...], expected: tuple[TensorSpec, ...]) -> str | None:
    """The first difference between two lists of tensors, in words; None if they are equal."""
    found, wanted = _by_name(said), _by_name(expected)
    for names, complaint in (
        (wanted.keys() - found.keys(), "missing"),
        (found.keys() - wanted.keys(), "too many"),
    ):
        if names:
            return f"{len(names)} {complaint} ({some(sorted(names))})"
    if len(found) != len(said):
        return f"{len(said) - len(found)} of {len(said)} names are there twice"
    for name, spec in found.items():
        if spec != wanted[name]:
            return f"{name} is {written(spec)} instead of {written(wanted[name])}"
    return None


def written(spec: TensorSpec) -> str:
    """A tensor's type and shape for a message."""
    return f"{shown(spec.dtype, 20)} {shown(list(spec.shape))}"


def _by_name(specs: tuple[TensorSpec, ...]) -> Mapping[str, Any]:
    return {spec.name: spec for spec in specs}
