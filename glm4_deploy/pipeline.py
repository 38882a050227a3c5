"""Export: a checkpoint folder becomes a bundle, proved right before it appears under its name."""

import dataclasses
import hashlib
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4_deploy import __version__
from glm4_deploy.destination import Destination, require_space
from glm4_exporters.cache_types import cache_providers, choose_cache
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.engine import (
    ENGINE_KINDS,
    EngineOptions,
    engine_attention,
    engine_version,
    gpu_capability,
    plugin_phases,
    require_engine,
    require_plugin,
)
from glm4_exporters.graph_io import graph_io
from glm4_exporters.quantize.recipe import read_recipe
from glm4_exporters.targets import RECIPE_FORMATS, Form, choose_form
from glm4_runtime.bundle import (
    GRAPH,
    REPORT,
    SCHEMA_VERSION,
    WEIGHTS,
    Limits,
    Manifest,
    ModelInfo,
    file_entry,
    write_manifest,
)
from glm4_runtime.errors import ExportError
from glm4_runtime.progress import Progress, silent

if TYPE_CHECKING:  # torch and onnx load when there is work for them, so that --print-key is quick
    import onnx_ir as ir

    from glm4_deploy.calibration import Prepared
    from glm4_deploy.engine_bundle import EngineBundle
    from glm4_deploy.parity import Parity
    from glm4_exporters.passes.plugin_attention import PluginAttention
    from glm4_exporters.weights import WrittenWeights

DEFAULT_TARGET, DEFAULT_PRECISION, DEFAULT_BATCH = "ort", "int8", 8
TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript")


@dataclass(frozen=True)
class ExportOptions:
    """What to export; every field but ``parity`` shapes the bundle and its cache key."""

    target: str = DEFAULT_TARGET
    precision: str = DEFAULT_PRECISION
    task: str | None = None  # the checkpoint's own where None
    max_seq_len: int | None = None  # the model's positions where None
    max_batch_size: int = DEFAULT_BATCH
    parity: bool = True
    activations: str | None = None  # of a quantized bundle; the target's choice where None
    calibration: str | None = None  # a file of text or token ids
    recipe: str | None = None  # a file of formats by tensor
    kv_cache: str = "auto"  # the activations' type, or int8
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass
class ExportResult:
    bundle: Path
    manifest: Manifest
    parity: "Parity | None"
    engine: "EngineBundle | None" = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0


def export(
    checkpoint: str | Path,
    bundle: str | Path,
    options: ExportOptions = ExportOptions(),
    *,
    force: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Make ``bundle`` from the checkpoint folder ``checkpoint``.

    The bundle is written aside and published when it is whole and its parity proved, so that whatever ends
    an export leaves the old bundle or none.

    Args:
        force: replace a bundle that is there already.

    Raises:
        ConfigError, CheckpointError: the checkpoint is not what it should be.
        ExportError: options that do not fit, no room on the disk, or something in the way.
        GateError: the bundle does not compute what the reference computes.
    """
    bundle = Path(bundle)
    destination = Destination(bundle, force)
    destination.recover()
    clock = _Clock()
    with Checkpoint.load(checkpoint, task=options.task) as source:
        limits, form = _check_options(source, options)
        destination.check(Path(checkpoint))
        _check_installed(options)
        prepared = _prepare(source, form, options, limits, clock, progress)
        with clock("trace"):
            progress("trace the model", 0, 0)
            model = _trace(source, form, prepared)
        with destination.staged() as folder:
            with clock("weights"):
                written = _write_model(source, model, prepared, folder, progress)
            _copy_side_files(source, folder)
            manifest = _describe(source, options, form, prepared, limits, model, folder, written)
            write_manifest(folder, manifest)
            parity = None
            if options.parity:
                with clock("parity"):
                    parity = _prove(folder, manifest, source, progress)
            engine = None
            if form.target.engine is not None:
                with clock("engine"):
                    engine = _build_engine(source, model, folder, manifest, form, prepared, options, progress)
                manifest = engine.manifest
            result = ExportResult(
                bundle, manifest, parity, engine, prepared.report, clock.seconds, _peak_rss()
            )
            _write_report(folder, options, result)
            destination.publish(folder)
    return result


def cache_key(checkpoint: str | Path, options: ExportOptions) -> str:
    """SHA-256 of everything that decides the bundle's bytes, without reading a weight.

    Options, versions of our package and the tools that shape a bundle, and the checkpoint's fingerprint:
    its configuration, its tensor headers, and per shard the content hash under which a hub cache stores
    it, or else size and modification time.
    """
    with Checkpoint.load(checkpoint, task=options.task) as source:
        limits, form = _check_options(source, options)
        shaping = {name: value for name, value in dataclasses.asdict(options).items() if name != "parity"}
        del shaping["engine"]["timing_cache"]  # saves time, and lies elsewhere on each machine
        for name in ("calibration", "recipe"):  # what they hold, wherever they lie
            shaping[name] = shaping[name] and _sha256(Path(shaping[name]))
        kind = form.target.engine
        parts = {
            "schema": SCHEMA_VERSION,
            "options": shaping | {"task": source.task} | dataclasses.asdict(limits),
            "tools": _tool_versions() | ({} if kind is None else {kind: engine_version(kind)}),
            "checkpoint": source.fingerprint(),
        }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# Before the work ----------------------------------------------------------------------------------


def _check_options(source: Checkpoint, options: ExportOptions) -> tuple[Limits, Form]:
    from glm4_deploy.calibration import require_text

    recipe = read_recipe(Path(options.recipe), RECIPE_FORMATS) if options.recipe is not None else None
    asked = options.target, options.precision, options.activations
    form = choose_form(source.config, source.task, *asked, recipe)
    if form.needs_text:
        require_text(options.calibration, options.precision)
    cache = choose_cache(source.config, source.task, options.target, form.activations, options.kv_cache)
    form = dataclasses.replace(form, kv_cache=cache)
    kind = form.target.engine
    require_engine(kind, options.target, options.precision, source.task, options.engine)
    positions = source.config.positions
    length = positions if options.max_seq_len is None else options.max_seq_len
    if not 1 <= length <= positions:
        raise ExportError(f"max_seq_len is {length}, but this model has 1 ... {positions} positions")
    if options.max_batch_size < 1:
        raise ExportError(f"max_batch_size is {options.max_batch_size}, but must be at least 1")
    if kind is not None and engine_attention(kind, source.task, options.engine) == "plugin":
        require_plugin(source.config, form.activations, options.max_batch_size, gpu_capability() or "")
    return Limits(length, options.max_batch_size), form


def _check_installed(options: ExportOptions) -> None:
    _tool_versions()
    if options.parity and find_spec("onnxruntime") is None:
        raise ExportError(
            "onnxruntime is not installed, which parity needs; install glm4-deploy[cpu], or say --no-parity"
        )
    if options.parity and options.target == "cpu":
        from glm4_plugins import block_product

        if block_product.library() is None:
            raise ExportError(
                "the CPU operators, which parity needs, were not built when glm4-deploy was installed; install a C++ "
                "compiler and glm4-deploy again, or say --no-parity"
            )


# The steps ----------------------------------------------------------------------------------------


def _prepare(
    source: Checkpoint,
    form: Form,
    options: ExportOptions,
    limits: Limits,
    clock: "_Clock",
    progress: Progress,
) -> "Prepared":
    from glm4_deploy.calibration import needs_text, prepare, read_text

    given = Path(options.calibration) if options.calibration else None
    if not needs_text(form, given is not None):
        return prepare(source, form, None)
    with clock("calibrate"):
        return prepare(source, form, read_text(source, given, limits.max_seq_len), progress)


def _trace(
    source: Checkpoint, form: Form, prepared: "Prepared", plugin: "PluginAttention | None" = None
) -> "ir.Model":
    """The graph in the target's dialect, or with its attention by our plugin."""
    from glm4_exporters.passes import lower
    from glm4_exporters.passes.input_major import InputMajor
    from glm4_exporters.passes.packed_products import PackedProducts
    from glm4_exporters.passes.quantize_cache import QuantizeCache
    from glm4_exporters.passes.quantize_inputs import QuantizeInputs
    from glm4_exporters.passes.quantize_weights import QuantizeWeights
    from glm4_exporters.passes.scale_eps import ScaleEps
    from glm4_exporters.trace import trace

    model = trace(source.config, source.task, form.activations)
    ScaleEps(prepared.norm_bits)(model)
    if plugin is None:
        lower(model, form.target.dialect)
    else:
        plugin(model)
    if prepared.cache_scales:
        QuantizeCache(prepared.cache_scales)(model)
    if form.target.dialect == "cpu":
        PackedProducts(form.formats)(model)
    if form.formats:
        products = {"ort": "fused", "cpu": "packed", "native": "standard"}[form.target.dialect]
        QuantizeWeights(products, form.formats)(model)
    if prepared.input_scales:
        QuantizeInputs(prepared.input_scales, unsigned=form.target.dialect != "native")(model)
    if form.target.engine is not None and ENGINE_KINDS[form.target.engine].input_major:
        InputMajor()(model)
    return model


def _write_model(
    source: Checkpoint, model: "ir.Model", prepared: "Prepared", folder: Path, progress: Progress
) -> "WrittenWeights":
    import onnx
    import onnx_ir as ir

    from glm4_exporters.weights import attach, layout, stored_bytes, write_weights

    tensors = layout(model)
    require_space(folder, stored_bytes(tensors))
    written = write_weights(source, tensors, folder / WEIGHTS, prepared.edits, progress)
    attach(model, tensors, WEIGHTS)
    ir.save(model, folder / GRAPH)
    onnx.checker.check_model(folder / GRAPH, full_check=True)
    return written


def _copy_side_files(source: Checkpoint, folder: Path) -> None:
    for name, path in source.side_files().items():
        shutil.copyfile(path, folder / name)


def _describe(
    source: Checkpoint,
    options: ExportOptions,
    form: Form,
    prepared: "Prepared",
    limits: Limits,
    model: "ir.Model",
    folder: Path,
    written: "WrittenWeights",
) -> Manifest:
    config, task = source.config, source.task
    io = graph_io(config, task, form.kv_cache or form.activations)
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir()) if path.name != WEIGHTS}
    return Manifest(
        task=task,
        target=options.target,
        dialect=form.target.dialect,
        precision=options.precision,
        activations=form.activations,
        kv_cache=form.kv_cache,
        model=ModelInfo(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_positions=config.positions,
            eos_token_ids=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            labels=config.id2label if task.endswith("classification") else (),
        ),
        limits=limits,
        opsets=dict(model.opset_imports),
        inputs=io.inputs,
        outputs=io.outputs,
        providers=cache_providers(form.kv_cache, form.target.providers[form.activations]),
        tensor_precisions=dict(form.groups),
        scaled_bits=dict(prepared.norm_bits),
        tools=_tool_versions(),
        config=config.to_dict(),
        source_sha256=written.source_sha256,
        files={**files, WEIGHTS: written.file},
        pooling="last-token, L2" if task == "encoder" else None,
    )


def _prove(folder: Path, manifest: Manifest, source: Checkpoint, progress: Progress) -> "Parity":
    from glm4_deploy.parity import check_parity, measure_parity

    parity = measure_parity(folder, manifest, source, progress)
    check_parity(parity, manifest)
    return parity


def _build_engine(
    source: Checkpoint,
    model: "ir.Model",
    folder: Path,
    manifest: Manifest,
    form: Form,
    prepared: "Prepared",
    options: ExportOptions,
    progress: Progress,
) -> "EngineBundle":
    from glm4_deploy.engine_bundle import make_engine
    from glm4_exporters.passes.plugin_attention import PluginAttention
    from glm4_exporters.weights import share_weights

    kind = form.target.engine
    assert kind is not None
    models = {"shared": model}
    if engine_attention(kind, source.task, options.engine) == "plugin":
        # Proven in the native dialect, built from ours, on the same weights.
        capability = int(gpu_capability() or 0)
        models = {
            phase: _trace(source, form, prepared, PluginAttention(options.max_batch_size, capability, phase))
            for phase in plugin_phases(options.engine.layout)
        }
        for other in models.values():
            share_weights(model, other)
    result = make_engine(folder, manifest, models, kind, options.engine, progress)
    write_manifest(folder, result.manifest)
    return result


def _write_report(folder: Path, options: ExportOptions, result: ExportResult) -> None:
    report: dict[str, Any] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "options": dataclasses.asdict(options),
        "seconds": result.seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "calibration": result.calibration or "nothing was calibrated",
        "parity": "not measured (--no-parity)" if result.parity is None else result.parity.as_dict(),
    }
    if result.engine is not None:
        from glm4_deploy.engine_bundle import engine_report

        report["engine"] = engine_report(result.engine.built)
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error


def _tool_versions() -> dict[str, str]:
    versions = {"glm4-deploy": __version__}
    for name in TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            raise ExportError(
                f"{name} is not installed, which export needs; install glm4-deploy[export]"
            ) from None
    return versions


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Clock:
    """Wall seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - start, 2)
