"""The bundle: a folder that holds everything needed to serve one model, and the manifest that describes it.

    manifest.json   a description of the bundle, and the SHA-256 of every other file except report.json
    report.json     measurements of the export; never read by a session, never compared
    model.onnx, model.onnx.data, tokenizer.json, chat_template.jinja, ...
    stage-1.onnx, stage-1.onnx.data, stage-2.onnx, ...   with --stages: instead of the two ONNX files
    model.engine                  for TensorRT: instead of the two ONNX files, or in addition to them
    stage-1.engine, stage-2.engine, ...                  for TensorRT with --stages

The reader owns the format: exporters build a :class:`Manifest` and call :func:`write_manifest`.
The manifest contains nothing that depends on the machine or the time. So two exports of one checkpoint with the same
options and tools are byte-identical, except for report.json and engines.
"""

from glm4_runtime.bundle.file_names import ENGINE, GRAPH, MANIFEST, REPORT, SIDE_FILES, WEIGHTS
from glm4_runtime.bundle.files import file_entry, sample_of, verify_files
from glm4_runtime.bundle.manifest import (
    COUNTERS,
    PRESENT_COUNTERS,
    SCHEMA_VERSION,
    AdapterInfo,
    AdapterSlots,
    EngineInfo,
    EngineProfile,
    FileEntry,
    Limits,
    Manifest,
    ModelInfo,
    StageInfo,
    TensorSpec,
    read_manifest,
    write_manifest,
)

__all__ = [
    "COUNTERS",
    "ENGINE",
    "GRAPH",
    "MANIFEST",
    "PRESENT_COUNTERS",
    "REPORT",
    "SCHEMA_VERSION",
    "SIDE_FILES",
    "StageInfo",
    "WEIGHTS",
    "AdapterInfo",
    "AdapterSlots",
    "EngineInfo",
    "EngineProfile",
    "FileEntry",
    "Limits",
    "Manifest",
    "ModelInfo",
    "TensorSpec",
    "file_entry",
    "read_manifest",
    "sample_of",
    "verify_files",
    "write_manifest",
]
