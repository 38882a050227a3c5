"""The last step of a TensorRT export: turns a proven ONNX bundle into an engine bundle."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4_deploy.plan import EngineBuild
from glm4_exporters.engine.build import PLUGIN_MODULE, BuiltEngine, EnginePlan, build_engine
from glm4_exporters.engine.kinds import engine_version
from glm4_exporters.engine.network import expected_layers
from glm4_exporters.engine.profiles import engine_profiles
from glm4_plugins.launch import choices, counters_shape
from glm4_runtime.bundle import COUNTERS, GRAPH, PRESENT_COUNTERS, WEIGHTS, EngineInfo, Manifest, TensorSpec
from glm4_runtime.progress import Progress

if TYPE_CHECKING:
    import onnx_ir as ir

# The graphs for the parser, and the weights that they do not share with the bundle's graph. They exist only during the
# build.
ENGINE_GRAPH, ENGINE_WEIGHTS = "engine.{}.onnx", "engine.weights"


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
    """Build the engine from the graph and weights in ``folder``, and make its manifest.

    Args:
        models: the graph as ``shared``, or one graph per profile by name. The passes that only engines need run here.

    Raises:
        ExportError: the builder refused, in one line.
    """
    import onnx_ir as ir

    from glm4_exporters.engine.graph_file import save_graphs
    from glm4_exporters.passes import engine_passes, run

    operators: dict[str, str] = {}
    for model in models.values():
        ir.external_data.set_base_dir(model.graph, folder)
        run(model, engine_passes(build.capacity))
        operators |= {str(node.name): node.op_type for node in model.graph}
    save_graphs({ENGINE_GRAPH.format(name): model for name, model in models.items()}, folder, ENGINE_WEIGHTS)
    plan = _plan(manifest, tuple(models), operators, build)
    built = build_engine(folder, plan, progress)
    for phase in models:
        (folder / ENGINE_GRAPH.format(phase)).unlink()
    (folder / ENGINE_WEIGHTS).unlink(missing_ok=True)
    if not build.keep_onnx:
        for name in (GRAPH, WEIGHTS):
            (folder / name).unlink()
    return EngineBundle(_described(manifest, plan, built, build), built)


def _plan(
    manifest: Manifest, phases: Sequence[str], operators: Mapping[str, str], build: EngineBuild
) -> EnginePlan:
    """The plan for the building process."""
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
    """The engine's manifest, from the manifest of the ONNX bundle."""
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
    """The entries of ``report.json`` about a build."""
    return {
        "build_peak_rss_bytes": built.peak_rss_bytes,
        "build_peak_anonymous_bytes": built.peak_anonymous_bytes,
        "kernels": built.kernels,
        "weights": built.weights,
        "warnings": list(built.warnings),
        "parity": "measured on the ONNX graph that the engine was built from, by ONNX Runtime on the CPU; "
        "keys and values are rounded as the engine's cache rounds them",
    }


def _of_engine(build: EngineBuild, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The graph's inputs or outputs, with the engine's fixed capacity and the type of its cache."""

    def spec_of(spec: TensorSpec) -> TensorSpec:
        cached = spec.name.startswith(("past_key_values.", "present_key_values."))
        dtype = str(build.kv_cache) if cached else spec.dtype
        return TensorSpec(
            spec.name, dtype, tuple(build.capacity if axis == "capacity" else axis for axis in spec.shape)
        )

    return tuple(map(spec_of, specs))


def _counters(name: str, build: EngineBuild) -> tuple[TensorSpec, ...]:
    """The plugin's counters, with the size in its graph; none if the engine uses native attention."""
    if not build.by_plugin:
        return ()
    tiles = choices(build.gpu or 0, processors=build.processors)[0]
    return (TensorSpec(name, "int32", counters_shape(tiles)),)


def _plugin_version() -> str:
    from glm4_plugins.operator import VERSION

    return str(VERSION)
