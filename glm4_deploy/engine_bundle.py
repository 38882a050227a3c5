"""The last step of an export to an engine: a proven ONNX bundle becomes an engine bundle."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4_deploy.plan import EngineBuild
from glm4_exporters.engine import (
    PLUGIN_MODULE,
    BuiltEngine,
    EnginePlan,
    build_engine,
    engine_profiles,
    engine_version,
    expected_layers,
)
from glm4_plugins.launch import choices, counters_shape
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
    build: EngineBuild,
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

    from glm4_exporters.passes import engine_passes, run

    operators: dict[str, str] = {}
    for phase, model in models.items():
        ir.save(run(model, engine_passes(build.capacity)), folder / ENGINE_GRAPH.format(phase))
        operators |= {str(node.name): node.op_type for node in model.graph}
    plan = _plan(manifest, tuple(models), operators, build)
    built = build_engine(folder, plan, progress)
    for phase in models:
        (folder / ENGINE_GRAPH.format(phase)).unlink()
    if not build.keep_onnx:
        for name in (GRAPH, WEIGHTS):
            (folder / name).unlink()
    return EngineBundle(_described(manifest, plan, built, build), built)


def _plan(
    manifest: Manifest, phases: Sequence[str], operators: Mapping[str, str], build: EngineBuild
) -> EnginePlan:
    """What the building process is told."""
    profiles = engine_profiles(manifest.task, manifest.limits, build.layout, build.attention)
    return EnginePlan(
        kind=build.kind,
        graphs={p.file: ENGINE_GRAPH.format(p.name if p.name in phases else "shared") for p in profiles},
        capabilities=build.capabilities,
        profiles=profiles,
        inputs=(
            *_of_engine(build, manifest.inputs),
            *_counters(COUNTERS, build),
        ),
        operators=operators,
        layers=expected_layers(
            operators, manifest.model.num_layers, manifest.kv_cache is not None, build.attention
        ),
        timing_cache=build.timing_cache and str(Path(build.timing_cache).absolute()),
        plugin=PLUGIN_MODULE if build.by_plugin else None,
    )


def _described(manifest: Manifest, plan: EnginePlan, built: BuiltEngine, build: EngineBuild) -> Manifest:
    """The manifest of the ONNX bundle as that of the engine."""
    built_from = {name: manifest.files[name] for name in (GRAPH, WEIGHTS)}
    kept = {n: entry for n, entry in manifest.files.items() if build.keep_onnx or n not in built_from}
    return dataclasses.replace(
        manifest,
        dialect=plan.kind,
        kv_cache=build.kv_cache,
        inputs=plan.inputs,
        outputs=(
            *_of_engine(build, manifest.outputs),
            *_counters(PRESENT_COUNTERS, build),
        ),
        compute_capabilities=build.runs_on or built.capabilities,
        providers=(),
        tools={**manifest.tools, plan.kind: engine_version(plan.kind)},
        files={**kept, **built.files},
        engine=EngineInfo(
            kind=plan.kind,
            version=engine_version(plan.kind),
            layout=build.layout,
            later_gpus=build.later_gpus,
            attention=build.attention,
            plugin_version=_plugin_version() if build.by_plugin else None,
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
        "parity": "measured on the ONNX graph that the engine was built from, by ONNX Runtime on the CPU; "
        "the rounding of an int8 cache is the engine's own and not part of it",
    }


def _of_engine(build: EngineBuild, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The graph's tensors, with the capacity that the engine fixes and the cache's type in it."""

    def spec_of(spec: TensorSpec) -> TensorSpec:
        cached = spec.name.startswith(("past_key_values.", "present_key_values."))
        dtype = str(build.kv_cache) if cached else spec.dtype
        return TensorSpec(
            spec.name, dtype, tuple(build.capacity if axis == "capacity" else axis for axis in spec.shape)
        )

    return tuple(map(spec_of, specs))


def _counters(name: str, build: EngineBuild) -> tuple[TensorSpec, ...]:
    """The plugin's counters, of the size that its graph declares; none where the engine attends natively."""
    if not build.by_plugin:
        return ()
    tiles = choices(build.gpu or 0, processors=build.processors)[0]
    return (TensorSpec(name, "int32", counters_shape(tiles)),)


def _plugin_version() -> str:
    from glm4_plugins.operator import VERSION

    return str(VERSION)
