"""Export: makes a bundle from a checkpoint folder, and proves it before it appears under its name."""

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from glm4_deploy.cache_key import cache_key
from glm4_deploy.describe import describe
from glm4_deploy.destination import Destination
from glm4_deploy.own_text import keep_text, own_text, require_small
from glm4_deploy.plan import DEFAULTS, ExportOptions, Plan, make_plan
from glm4_deploy.quantized_source import source_report
from glm4_deploy.report import Clock, ExportResult, write_report
from glm4_deploy.room import require_room
from glm4_deploy.side_files import compare_side_files
from glm4_deploy.tools import require_installed
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.graph_io import model_info
from glm4_exporters.peak_memory import peak_memory
from glm4_runtime.bundle import GRAPH, WEIGHTS, AdapterSlots, Manifest, write_manifest
from glm4_runtime.bundle.ascii_path import ascii_path
from glm4_runtime.bundle.element_types import CACHE_TYPES
from glm4_runtime.bundle.file_names import ADAPTER_GRAPH, TOKENIZER
from glm4_runtime.bundle.graph_checks import check_graph
from glm4_runtime.bundle.graph_io import stage_io
from glm4_runtime.errors import ExportError
from glm4_runtime.progress import Progress, silent

if TYPE_CHECKING:  # torch and onnx are imported when needed, so that --print-key is quick
    import onnx_ir as ir

    from glm4_deploy.calibration import Prepared
    from glm4_deploy.engine_bundle import EngineBundle
    from glm4_deploy.export_gate import ExportVerdict
    from glm4_deploy.parity import Parity
    from glm4_exporters.weights import WrittenWeights


def export(
    checkpoint: str | Path,
    bundle: str | Path,
    options: ExportOptions = DEFAULTS,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Make ``bundle`` from the checkpoint folder ``checkpoint``.

    The bundle is written to a hidden folder, and published when it is complete and its parity proved. So an export
    that ends early leaves the old bundle or none.

    Args:
        force: replace an existing bundle.

    Raises:
        ConfigError, CheckpointError: the checkpoint is damaged or not supported.
        ExportError: the options do not fit, the disk is too small, or the place is occupied.
        GateError: the bundle's outputs differ too much from the reference's.
    """
    bundle = Path(bundle)
    destination = require_destination(checkpoint, bundle, force)
    clock = Clock()
    with Checkpoint.load(checkpoint, options.task, options.adapters) as source:
        plan = make_plan(source, options)
        warnings = _check_before_work(plan, source, destination)
        prepared = _prepare(plan, source, clock, progress)
        _require_unscaled(plan, prepared)
        with clock("trace"):
            progress("trace the model", 0, 0)
            model = _trace(plan, prepared)
        with destination.staged() as folder:
            with clock("weights"):
                written, parts = _write_model(plan, source, model, prepared, folder, progress)
            _write_adapter_graph(plan, prepared, model, folder)
            _copy_side_files(source, plan, folder)
            manifest = describe(plan, prepared, model, folder, written)
            write_manifest(folder, manifest)
            check_graph(folder, manifest)  # a bundle that no session opens is an error
            parity, gate, engine = None, None, None
            if options.parity:
                with clock("parity"):
                    parity, gate = _prove(folder, manifest, plan, source, progress)
            if plan.engine is not None:
                with clock("engine"):
                    engine = _build_engines(plan, prepared, parts, folder, manifest, progress)
                manifest = engine.manifest
            result = ExportResult(
                bundle,
                manifest,
                parity,
                gate,
                engine,
                prepared.report,
                clock.seconds,
                peak_memory(),
                warnings,
                source_report(source, plan),
            )
            write_report(folder, options, result)
            destination.publish(folder)
    return result


def require_destination(checkpoint: str | Path, bundle: str | Path, force: bool) -> Destination:
    """The place of a bundle, after a cleanup of killed exports.

    Raises:
        ExportError: the bundle cannot be published there.
    """
    destination = Destination(Path(bundle), force)
    destination.recover()
    destination.check(Path(checkpoint))
    return destination


def _check_before_work(plan: Plan, source: Checkpoint, destination: Destination) -> list[str]:
    """Refuse what would fail later; returns warnings about side files."""
    from glm4_deploy.texts import read_sequences
    from glm4_runtime.defaults import read_sampling_defaults
    from glm4_runtime.tokenizer import Tokenizer

    read_sampling_defaults(source.folder)  # refuses invalid sampling defaults
    warnings = compare_side_files(source)
    require_installed(plan)
    require_room(plan, destination.place)
    tokenizer = Tokenizer.from_folder(source.folder) if TOKENIZER in source.side_files() else None
    length, vocab = plan.limits.max_seq_len, plan.config.vocab_size
    if plan.text is not None:
        read_sequences(plan.text, tokenizer, length, 1, vocab)
        require_small(plan.text)
    elif plan.options.parity:
        from glm4_deploy.parity import read_own_text

        read_own_text(own_text(source.folder), tokenizer, length, vocab)
    return warnings


def _prepare(plan: Plan, source: Checkpoint, clock: Clock, progress: Progress) -> "Prepared":
    from glm4_deploy.calibration import needs_text, prepare, read_text

    brought = _brought_scales(source, plan)
    if not needs_text(plan.form, plan.calibration is not None):
        prepared = prepare(source, plan.form, None, brought=brought)
    else:
        with clock("calibrate"):
            text = read_text(source, plan.calibration, plan.limits.max_seq_len)
            prepared = prepare(source, plan.form, text, progress, brought)
    return _keeping(source, plan, _with_factors(source, plan, prepared))


def _with_factors(source: Checkpoint, plan: Plan, prepared: "Prepared") -> "Prepared":
    """With the factors of the keys, if the rows of the cache have scales."""
    from glm4_exporters.quantize.key_factors import key_factors

    kind = CACHE_TYPES.get(str(plan.form.kv_cache))
    if kind is None or not kind.scale_bytes:
        return prepared
    return dataclasses.replace(prepared, key_factors=key_factors(source))


def _require_unscaled(plan: Plan, prepared: "Prepared") -> None:
    """Refuse adapters beside weights that smoothing scales: adapters are trained for the checkpoint's own weights."""
    if plan.slots is not None and prepared.edits.smoothing.names:
        raise ExportError(
            f"precision {plan.form.precision} with {plan.form.activations} activations scales this model's weights, so "
            "that adapters do not fit them; take another --precision, or merge the adapter with --lora"
        )


def _brought_scales(source: Checkpoint, plan: Plan) -> dict[str, float]:
    """The input scales that a quantized checkpoint brings; empty where the user gives text to find others."""
    from glm4_exporters.sources.inputs import brought_scales

    return {} if plan.calibration is not None else brought_scales(source, plan.form.rounded_inputs) or {}


def _keeping(source: Checkpoint, plan: Plan, prepared: "Prepared") -> "Prepared":
    """With the numbers that a quantized checkpoint brings, where the plan keeps them."""
    from glm4_exporters.formats.brought import Brought
    from glm4_exporters.sources.kept import KeptMatrix

    views = source.views.by_name
    kept = {
        name: KeptMatrix(views[source.name_of(name)], form, source.read_stored)
        for name, form in plan.form.formats.items()
        if isinstance(form, Brought)
    }
    scaled = sorted(kept.keys() & prepared.edits.smoothing.names)
    if scaled:
        raise ExportError(
            f"this model overflows fp16, and its remedy would scale {scaled[0]}, whose numbers are kept; take "
            "--target cpu, ort or native, or say --precision int8 --activations bf16"
        )
    edits = dataclasses.replace(prepared.edits, found={**prepared.edits.found, **kept})
    return dataclasses.replace(prepared, edits=edits) if kept else prepared


def _trace(
    plan: Plan,
    prepared: "Prepared",
    engine_graph: str | None = None,
    slots: AdapterSlots | None = None,
) -> "ir.Model":
    """The graph that is written and proved.

    Args:
        engine_graph: name of an engine's graph with our plugin, to be traced instead.
        slots: adapters that the graph takes.
    """
    from glm4_exporters.passes import model_passes, run
    from glm4_exporters.passes.plugin_attention import PluginAttention
    from glm4_exporters.trace import trace

    plugin = None
    if engine_graph is not None:
        build = plan.engine
        assert build is not None
        batch, gpu = plan.limits.max_batch_size, build.gpu or 0
        plugin = PluginAttention(batch, gpu, engine_graph, build.processors, build.small_tiles)
    passes = model_passes(
        plan.form,
        norm_bits=prepared.norm_bits,
        cache_scales=prepared.cache_scales,
        input_scales=prepared.input_scales,
        key_factors=prepared.key_factors,
        plugin=plugin,
        slots=slots,
        stages=plan.stages,
    )
    return run(trace(plan.config, plan.task, plan.form.activations), passes)


def _write_model(
    plan: Plan, source: Checkpoint, model: "ir.Model", prepared: "Prepared", folder: Path, progress: Progress
) -> "tuple[WrittenWeights, list[ir.Model]]":
    """Write the graph and its weights, or those of each stage. Returns the graphs, too, which then have weights."""
    from glm4_exporters.weights import attach, layout, write_files

    names = [(stage.graph, stage.weights) for stage in plan.stages] or [(GRAPH, WEIGHTS)]
    parts = dict(zip(names, _parts_of(plan, model, plan.graph_cache), strict=True))
    layouts = {weights: layout(part) for (_, weights), part in parts.items()}
    paths = {folder / weights: tensors for weights, tensors in layouts.items()}
    written = write_files(source, paths, prepared.edits, progress)
    for (graph, weights), part in parts.items():
        attach(part, layouts[weights], weights)
        _save(part, folder / graph)
    return written, list(parts.values())


def _parts_of(plan: Plan, model: "ir.Model", cache: str | None) -> "list[ir.Model]":
    """The graph of each stage; without stages, the graph.

    Args:
        cache: element type of the graph's KV cache.
    """
    from glm4_exporters.stage_cut import cut

    info, types = model_info(plan.config, plan.task), (str(cache), plan.form.activations)
    return [cut(model, stage_io(info, *types, stage)) for stage in plan.stages] or [model]


def _save(model: "ir.Model", path: Path) -> None:
    import onnx
    import onnx_ir as ir

    ir.save(model, path)
    with ascii_path(path) as plain:
        onnx.checker.check_model(plain, full_check=True)


def _write_adapter_graph(plan: Plan, prepared: "Prepared", model: "ir.Model", folder: Path) -> None:
    """Write the graph that takes adapters, if the user wants one. It has the weights of ``model``."""
    from glm4_exporters.weights import share_weights

    if plan.slots is None:
        return
    adapted = _trace(plan, prepared, slots=plan.slots)
    share_weights(model, adapted)
    _save(adapted, folder / ADAPTER_GRAPH)


def _copy_side_files(source: Checkpoint, plan: Plan, folder: Path) -> None:
    for name, path in source.side_files().items():
        shutil.copyfile(path, folder / name)
    if plan.text is not None:
        keep_text(plan.text, folder)


def _prove(
    folder: Path, manifest: Manifest, plan: Plan, source: Checkpoint, progress: Progress
) -> "tuple[Parity, ExportVerdict]":
    """Measure parity, and refuse a bundle that exceeds a limit of parity or of the gate."""
    from glm4_deploy.export_gate import judge, require_passed
    from glm4_deploy.parity import check_parity, measure_parity

    parity = measure_parity(folder, manifest, source, progress)
    rounded = dataclasses.replace(
        manifest, kv_cache=plan.form.kv_cache
    )  # the graph rounds as an engine's cache
    check_parity(parity, rounded)
    verdict = judge(parity, rounded)
    require_passed(verdict)
    return parity, verdict


def _build_engines(
    plan: Plan,
    prepared: "Prepared",
    parts: "list[ir.Model]",
    folder: Path,
    manifest: Manifest,
    progress: Progress,
) -> "EngineBundle":
    """Build the engines from the proved graphs, or with our plugin from separate graphs with the same weights."""
    from glm4_deploy.engine_bundle import make_engines

    assert plan.engine is not None
    models = [{"shared": part} for part in parts]
    if plan.engine.by_plugin:
        models = _plugin_graphs(plan, prepared, parts)
    result = make_engines(folder, manifest, models, plan.engine, progress)
    write_manifest(folder, result.manifest)
    return result


def _plugin_graphs(plan: Plan, prepared: "Prepared", parts: "list[ir.Model]") -> "list[dict[str, ir.Model]]":
    """The graphs with our plugin: for each of ``parts``, by name."""
    from glm4_exporters.weights import share_weights

    assert plan.engine is not None
    found: list[dict[str, ir.Model]] = [{} for _ in parts]
    for name in plan.engine.graphs:
        whole = _trace(plan, prepared, name)
        for models, part, own in zip(found, parts, _parts_of(plan, whole, plan.engine.kv_cache), strict=True):
            share_weights(part, own)
            models[name] = own
    return found


__all__ = ["ExportOptions", "ExportResult", "cache_key", "export"]
