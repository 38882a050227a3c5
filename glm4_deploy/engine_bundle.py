"""The last step of a TensorRT export: turns a proven ONNX bundle into an engine bundle.

Of a bundle with stages, each stage becomes an engine of its own, in a process of its own, one after another.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4_deploy.plan import EngineBuild
from glm4_exporters.engine.build import PLUGIN_MODULE, BuiltEngine, EnginePlan, build_engine
from glm4_exporters.engine.kinds import engine_version
from glm4_exporters.engine.network import expected_layers
from glm4_exporters.engine.profiles import engine_profiles
from glm4_exporters.stages import stage_profiles
from glm4_plugins.launch import choices, counters_shape
from glm4_runtime.bundle import (
    COUNTERS,
    GRAPH,
    PRESENT_COUNTERS,
    WEIGHTS,
    EngineInfo,
    EngineProfile,
    Manifest,
    TensorSpec,
)
from glm4_runtime.bundle.stage_manifest import stage_manifest
from glm4_runtime.progress import Progress

if TYPE_CHECKING:
    import onnx_ir as ir

# The graphs for the parser, and the weights that they do not share with the bundle's graph. They exist only during the
# build.
ENGINE_GRAPH, ENGINE_WEIGHTS = "engine.{}.onnx", "engine.weights"


@dataclass(frozen=True)
class EngineBundle:
    """
    Attributes:
        stages: the result of each build, in the order of the stages. One result for a bundle without stages.
    """

    manifest: Manifest
    stages: tuple[BuiltEngine, ...]

    @property
    def built(self) -> BuiltEngine:
        """All builds as one: sums, and the largest memory."""
        return _combined(self.stages)


@dataclass(frozen=True)
class Part:
    """The model or one stage, of which an engine is built.

    Attributes:
        manifest: of its ONNX files.
        graph, weights: their names.
        models: the graph as ``shared``, or one graph per profile by name.
        profiles: of its engine.
    """

    manifest: Manifest
    graph: str
    weights: str
    models: Mapping[str, "ir.Model"]
    profiles: tuple[EngineProfile, ...]


def make_engines(
    folder: Path,
    manifest: Manifest,
    models: Sequence[Mapping[str, "ir.Model"]],
    build: EngineBuild,
    progress: Progress,
) -> EngineBundle:
    """Build the engines from the graphs and weights in ``folder``, and make their manifest.

    A part's ONNX files are deleted after its build, unless the user keeps them. So the disk holds the engines so far and
    the other parts' weights.

    Args:
        models: for each stage, or for the whole model, the graph as ``shared``, or one graph per profile by name. The
            passes that only engines need run here.

    Raises:
        ExportError: the builder refused, in one line.
    """
    parts = _parts(manifest, models, build)
    stages = []
    for number, part in enumerate(parts):
        stages.append(make_engine(folder, part, build, _share(progress, number, len(parts))))
        if not build.keep_onnx:
            for name in (part.graph, part.weights):
                (folder / name).unlink()
    return EngineBundle(_described(manifest, parts, stages, build), tuple(stages))


def make_engine(folder: Path, part: Part, build: EngineBuild, progress: Progress) -> BuiltEngine:
    """Build the engine of one part."""
    import onnx_ir as ir

    from glm4_exporters.engine.graph_file import save_graphs
    from glm4_exporters.passes import engine_passes, run

    operators: dict[str, str] = {}
    for model in part.models.values():
        ir.external_data.set_base_dir(model.graph, folder)
        run(model, engine_passes(build.capacity))
        operators |= {str(node.name): node.op_type for node in model.graph}
    save_graphs(
        {ENGINE_GRAPH.format(name): model for name, model in part.models.items()}, folder, ENGINE_WEIGHTS
    )
    built = build_engine(folder, _plan(part, operators, build), progress)
    for phase in part.models:
        (folder / ENGINE_GRAPH.format(phase)).unlink()
    (folder / ENGINE_WEIGHTS).unlink(missing_ok=True)
    return built


def _parts(manifest: Manifest, models: Sequence[Mapping[str, "ir.Model"]], build: EngineBuild) -> list[Part]:
    profiles = engine_profiles(manifest.task, manifest.limits, build.layout, build.attention)
    if not manifest.stages:
        return [Part(manifest, GRAPH, WEIGHTS, models[0], profiles)]
    return [
        Part(
            stage_manifest(manifest, stage),
            stage.graph,
            stage.weights,
            own,
            stage_profiles(profiles, number),
        )
        for number, (stage, own) in enumerate(zip(manifest.stages, models, strict=True), 1)
    ]


def _share(progress: Progress, number: int, count: int) -> Progress:
    """The progress of one of several builds, as a share of all."""
    return lambda step, done, total: progress(step, number * total + done, count * total)


def _plan(part: Part, operators: Mapping[str, str], build: EngineBuild) -> EnginePlan:
    """The plan for the building process."""
    manifest, names = part.manifest, {phase: ENGINE_GRAPH.format(phase) for phase in part.models}
    return EnginePlan(
        kind=build.kind,
        graphs={p.file: names.get(p.name) or names["shared"] for p in part.profiles},
        capabilities=build.capabilities,
        profiles=part.profiles,
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


def _described(
    manifest: Manifest, parts: Sequence[Part], stages: Sequence[BuiltEngine], build: EngineBuild
) -> Manifest:
    """The engines' manifest, from the manifest of the ONNX bundle."""
    built_from = {name: manifest.files[name] for part in parts for name in (part.graph, part.weights)}
    kept = {n: entry for n, entry in manifest.files.items() if build.keep_onnx or n not in built_from}
    built = _combined(stages)
    return dataclasses.replace(
        manifest,
        dialect=build.kind,
        kv_cache=build.kv_cache,
        inputs=(
            *_of_engine(build, manifest.inputs),
            *_counters(COUNTERS, build),
        ),
        outputs=(
            *_of_engine(build, manifest.outputs),
            *_counters(PRESENT_COUNTERS, build),
        ),
        compute_capabilities=build.runs_on or built.capabilities,
        providers=(),
        tools={**manifest.tools, build.kind: engine_version(build.kind)},
        files={**kept, **built.files},
        stages=tuple(
            dataclasses.replace(stage, profiles=part.profiles)
            for stage, part in zip(manifest.stages, parts, strict=False)  # no stages: one part
        ),
        engine=EngineInfo(
            kind=build.kind,
            version=engine_version(build.kind),
            layout=build.layout,
            later_gpus=build.later_gpus,
            attention=build.attention,
            plugin_version=_plugin_version() if build.by_plugin else None,
            profiles=() if manifest.stages else parts[0].profiles,
            layers=built.layers,
            float32=built.float32,
            built_from=built_from,
        ),
    )


def _combined(stages: Sequence[BuiltEngine]) -> BuiltEngine:
    if len(stages) == 1:
        return stages[0]
    return BuiltEngine(
        files={name: entry for stage in stages for name, entry in stage.files.items()},
        layers=_sum(stage.layers for stage in stages),
        float32=_sum(stage.float32 for stage in stages),
        capabilities=stages[0].capabilities,
        kernels=_sums([stage.kernels for stage in stages]),
        peak_rss_bytes=max(stage.peak_rss_bytes for stage in stages),
        peak_anonymous_bytes=max(stage.peak_anonymous_bytes for stage in stages),
        warnings=tuple(warning for stage in stages for warning in stage.warnings),
        weights=_sums([stage.weights for stage in stages]),
        seconds=sum(stage.seconds for stage in stages),
    )


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _sums(counts: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Sums by profile."""
    return {name: _sum(count[name] for count in counts) for name in counts[0]}


def engine_report(bundle: EngineBundle) -> dict[str, Any]:
    """The entries of ``report.json`` about the builds. Those of all stages are sums; memory is that of the largest."""
    report = build_report(bundle.built)
    if bundle.manifest.stages:
        report["stages"] = [build_report(stage) for stage in bundle.stages]
    return report | {
        "parity": "measured on the ONNX graph that the engine was built from, by ONNX Runtime on the CPU; "
        "keys and values are rounded as the engine's cache rounds them"
    }


def build_report(built: BuiltEngine) -> dict[str, Any]:
    return {
        "build_seconds": built.seconds,
        "build_peak_rss_bytes": built.peak_rss_bytes,
        "build_peak_anonymous_bytes": built.peak_anonymous_bytes,
        "layers": built.layers,
        "kernels": built.kernels,
        "weights": built.weights,
        "warnings": list(built.warnings),
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
