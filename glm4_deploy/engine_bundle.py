"""The last step of an export to an engine: a proven ONNX bundle becomes an engine bundle."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4_exporters.engine import (
    PLUGIN_MODULE,
    BuiltEngine,
    EngineOptions,
    EnginePlan,
    build_engine,
    engine_attention,
    engine_capabilities,
    engine_capacity,
    engine_profiles,
    engine_version,
    expected_layers,
)
from glm4_runtime.bundle import COUNTERS, GRAPH, PRESENT_COUNTERS, WEIGHTS, EngineInfo, Manifest, TensorSpec
from glm4_runtime.progress import Progress

if TYPE_CHECKING:
    import onnx_ir as ir

ENGINE_GRAPH = "engine.{}.onnx"  # graphs as the parser gets them, there only while the engine is built


@dataclass(frozen=True)
class EngineBundle:
    manifest: Manifest
    built: BuiltEngine


def make_engine(
    folder: Path,
    manifest: Manifest,
    models: Mapping[str, "ir.Model"],
    kind: str,
    options: EngineOptions,
    progress: Progress,
) -> EngineBundle:
    """Build the engine of the graph and weights in ``folder``, and describe it in a manifest of its own.

    Args:
        models: the graph as ``shared``, or a graph for each profile by its name, in the dialect that the engine is
            built from; what only engines need is done to them here.

    Raises:
        ExportError: the builder refused, in one line.
    """
    import onnx_ir as ir

    from glm4_exporters.passes.fix_capacity import FixCapacity
    from glm4_exporters.passes.split_products import SplitProducts

    capacity = engine_capacity(manifest.limits.max_seq_len)
    operators: dict[str, str] = {}
    for phase, model in models.items():
        for change in (FixCapacity(capacity), SplitProducts()):
            change(model)
        ir.save(model, folder / ENGINE_GRAPH.format(phase))
        operators |= {str(node.name): node.op_type for node in model.graph}
    plan = _plan(manifest, tuple(models), operators, kind, options)
    built = build_engine(folder, plan, progress)
    for phase in models:
        (folder / ENGINE_GRAPH.format(phase)).unlink()
    if not options.keep_onnx:
        for name in (GRAPH, WEIGHTS):
            (folder / name).unlink()
    return EngineBundle(_described(manifest, plan, built, options), built)


def _plan(
    manifest: Manifest, phases: Sequence[str], operators: Mapping[str, str], kind: str, options: EngineOptions
) -> EnginePlan:
    """What the building process is told."""
    attention = engine_attention(kind, manifest.task, options)
    profiles = engine_profiles(manifest.task, manifest.limits, options.layout, attention)
    by_plugin = attention == "plugin"
    return EnginePlan(
        kind=kind,
        graphs={p.file: ENGINE_GRAPH.format(p.name if p.name in phases else "shared") for p in profiles},
        capabilities=engine_capabilities(kind, manifest.precision, options)[0],
        profiles=profiles,
        inputs=(*_with_capacity(manifest, manifest.inputs), *(_counters(COUNTERS, manifest) * by_plugin)),
        operators=operators,
        layers=expected_layers(
            operators, manifest.model.num_layers, manifest.kv_cache is not None, attention
        ),
        timing_cache=options.timing_cache and str(Path(options.timing_cache).absolute()),
        plugin=PLUGIN_MODULE if by_plugin else None,
    )


def _described(manifest: Manifest, plan: EnginePlan, built: BuiltEngine, options: EngineOptions) -> Manifest:
    """The manifest of the ONNX bundle as that of the engine."""
    _, capabilities, later = engine_capabilities(plan.kind, manifest.precision, options)
    by_plugin = plan.plugin is not None
    built_from = {name: manifest.files[name] for name in (GRAPH, WEIGHTS)}
    kept = {n: entry for n, entry in manifest.files.items() if options.keep_onnx or n not in built_from}
    return dataclasses.replace(
        manifest,
        dialect=plan.kind,
        inputs=plan.inputs,
        outputs=(
            *_with_capacity(manifest, manifest.outputs),
            *(_counters(PRESENT_COUNTERS, manifest) * by_plugin),
        ),
        compute_capabilities=capabilities or built.capabilities,
        providers=(),
        tools={**manifest.tools, plan.kind: engine_version(plan.kind)},
        files={**kept, **built.files},
        engine=EngineInfo(
            kind=plan.kind,
            version=engine_version(plan.kind),
            layout=options.layout,
            later_gpus=later,
            attention=engine_attention(plan.kind, manifest.task, options),
            plugin_version=_plugin_version() if by_plugin else None,
            profiles=plan.profiles,
            layers=built.layers,
            float32=built.float32,
            built_from=built_from,
        ),
    )


def engine_report(built: BuiltEngine) -> dict[str, Any]:
    """What ``report.json`` says of a build."""
    return {
        "build_peak_rss_bytes": built.peak_rss_bytes,
        "build_peak_anonymous_bytes": built.peak_anonymous_bytes,
        "kernels": built.kernels,
        "warnings": list(built.warnings),
        "parity": "measured on the ONNX graph that the engine was built from, by ONNX Runtime on the CPU",
    }


def _with_capacity(manifest: Manifest, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    capacity = engine_capacity(manifest.limits.max_seq_len)
    return tuple(
        TensorSpec(spec.name, spec.dtype, tuple(capacity if a == "capacity" else a for a in spec.shape))
        for spec in specs
    )


def _counters(name: str, manifest: Manifest) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name, "int32", (manifest.limits.max_batch_size * manifest.model.num_kv_heads,)),)


def _plugin_version() -> str:
    from glm4_plugins.operator import VERSION

    return str(VERSION)
