"""The bundle: a folder that holds everything needed to serve one model, and the manifest that describes it.

    manifest.json   what the bundle is, and the SHA-256 of every other file but report.json
    report.json     what was measured when it was made; never read to serve, never compared
    model.onnx, model.onnx.data, tokenizer.json, chat_template.jinja, ...
    model.engine                  in place of the two ONNX files, or beside them, where the target is an engine

The reader owns the format: exporters build a :class:`Manifest` and call :func:`write_manifest`.
Nothing that depends on the machine or the moment is in the manifest, so two exports of one checkpoint
with the same options and tools are byte-identical apart from report.json.
"""

from glm4_runtime.bundle.files import file_entry, sample_of, verify_files
from glm4_runtime.bundle.manifest import (
    COUNTERS,
    ENGINE,
    GRAPH,
    MANIFEST,
    PRESENT_COUNTERS,
    REPORT,
    SCHEMA_VERSION,
    TOKENIZER_FILES,
    WEIGHTS,
    EngineInfo,
    EngineProfile,
    FileEntry,
    Limits,
    Manifest,
    ModelInfo,
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
    "TOKENIZER_FILES",
    "WEIGHTS",
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
