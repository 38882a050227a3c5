"""The manifest of one stage alone, made from the manifest of the whole model."""

from dataclasses import replace

from glm4_runtime.bundle.graph_io import past_names, stage_io
from glm4_runtime.bundle.manifest import COUNTERS, PRESENT_COUNTERS, Manifest, StageInfo, TensorSpec


def stage_manifest(manifest: Manifest, stage: StageInfo) -> Manifest:
    """A manifest for one stage: with its layers, inputs, outputs and files, and the profiles of its engine."""
    capacity = next(spec.shape[2] for spec in manifest.inputs if spec.name == past_names(0)[0])
    io = stage_io(manifest.model, str(manifest.kv_cache), manifest.activations, stage, capacity)
    return replace(
        manifest,
        model=replace(manifest.model, num_layers=stage.layers),
        inputs=(*io.inputs, *_counters(manifest.inputs)),
        outputs=(*io.outputs, *_counters(manifest.outputs)),
        files={name: entry for name, entry in manifest.files.items() if name in stage.files},
        engine=manifest.engine and replace(manifest.engine, profiles=stage.profiles),
        stages=(),
    )


def _counters(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The counters of our attention plugin, which every stage has."""
    return tuple(spec for spec in specs if spec.name in (COUNTERS, PRESENT_COUNTERS))
