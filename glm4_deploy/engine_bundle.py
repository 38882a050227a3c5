"""The last step of an export to an engine: a proven ONNX bundle becomes an engine bundle."""

import dataclasses
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
from glm4_runtime.bundle import GRAPH, WEIGHTS, EngineInfo, Manifest, TensorSpec
from glm4_runtime.progress import Progress

if TYPE_CHECKING:
    import onnx_ir as ir

ENGINE_GRAPH = "engine.onnx"  # the graph as the parser gets it, there only while the engine is built


@dataclass(frozen=True)
class EngineBundle:
    manifest: Manifest
    built: BuiltEngine


def make_engine(
    folder: Path, manifest: Manifest, model: "ir.Model", kind: str, options: EngineOptions, progress: Progress
) -> EngineBundle:
    """Build the engine of the graph and weights in ``folder``, and describe it in a manifest of its own.

    Args:
        model: the graph in the dialect that the engine is built from; what only engines need is done to it here.

    Raises:
        ExportError: the builder refused, in one line.
    """
    import onnx_ir as ir

    from glm4_exporters.passes.fix_capacity import FixCapacity
    from glm4_exporters.passes.split_products import SplitProducts

    capacity = engine_capacity(manifest.limits.max_seq_len)
    for change in (FixCapacity(capacity), SplitProducts()):
        change(model)
    ir.save(model, folder / ENGINE_GRAPH)
    named, capabilities, later = engine_capabilities(kind, manifest.precision, options)
    attention = engine_attention(kind, options)
    operators = {str(node.name): node.op_type for node in model.graph}
    plan = EnginePlan(
        kind=kind,
        graph=ENGINE_GRAPH,
        capabilities=named,
        profiles=engine_profiles(manifest.task, manifest.limits, options.layout),
        inputs=_with_capacity(manifest.inputs, capacity),
        operators=operators,
        layers=expected_layers(
            operators, manifest.model.num_layers, manifest.kv_cache is not None, attention
        ),
        timing_cache=options.timing_cache and str(Path(options.timing_cache).absolute()),
        plugin=PLUGIN_MODULE if attention == "plugin" else None,
    )
    built = build_engine(folder, plan, progress)
    (folder / ENGINE_GRAPH).unlink()
    files = {**manifest.files, **built.files}
    if not options.keep_onnx:
        for name in (GRAPH, WEIGHTS):
            (folder / name).unlink()
            del files[name]
    engine = EngineInfo(
        kind=kind,
        version=engine_version(kind),
        layout=options.layout,
        later_gpus=later,
        attention=attention,
        plugin_version=_plugin_version() if attention == "plugin" else None,
        profiles=plan.profiles,
        layers=built.layers,
        float32=built.float32,
        built_from={name: manifest.files[name] for name in (GRAPH, WEIGHTS)},
    )
    return EngineBundle(
        dataclasses.replace(
            manifest,
            dialect=kind,
            inputs=plan.inputs,
            outputs=_with_capacity(manifest.outputs, capacity),
            compute_capabilities=capabilities or built.capabilities,
            providers=(),
            tools={**manifest.tools, kind: engine_version(kind)},
            files=files,
            engine=engine,
        ),
        built,
    )


def engine_report(built: BuiltEngine) -> dict[str, Any]:
    """What ``report.json`` says of a build."""
    return {
        "build_peak_rss_bytes": built.peak_rss_bytes,
        "build_peak_anonymous_bytes": built.peak_anonymous_bytes,
        "kernels": built.kernels,
        "parity": "measured on the ONNX graph that the engine was built from, by ONNX Runtime on the CPU",
    }


def _with_capacity(specs: tuple[TensorSpec, ...], capacity: int) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(spec.name, spec.dtype, tuple(capacity if a == "capacity" else a for a in spec.shape))
        for spec in specs
    )


def _plugin_version() -> str:
    from glm4_plugins.operator import VERSION

    return str(VERSION)
