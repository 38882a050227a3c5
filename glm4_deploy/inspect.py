"""Describes a checkpoint or a bundle, from headers and manifests. Reads no weight."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4_deploy.end_tokens import end_tokens
from glm4_deploy.folders import BUNDLES, require_either
from glm4_runtime.bundle import MANIFEST, REPORT, Manifest, read_manifest
from glm4_runtime.bundle.element_types import CACHE_TYPES
from glm4_runtime.bundle.file_names import TOKENIZER
from glm4_runtime.bundle.files import checked_at_opening
from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.errors import BundleError, Glm4Error

if TYPE_CHECKING:
    from glm4_exporters.config import Glm4Config
    from glm4_runtime.tokenizer import Tokenizer

# Usual memory sizes in GiB. For each, the fitting precisions are listed.
MEMORIES = (8, 12, 16, 24, 32, 40, 48, 80, 141)
SHOWN_PRECISIONS = {
    "fp32": "fp32",
    "fp16 or bf16": "fp16",
    "int8": "int8",
    "int4": "int4",
}  # of target ort, by their label
ASSUMED_CONTEXT = 8192


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint folder or a bundle folder.

    Raises:
        Glm4Error: the folder is neither of the two, or it is damaged.
    """
    path = Path(path)
    if require_either(path) in BUNDLES:
        return inspect_bundle(path)
    return inspect_checkpoint(path)


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    from glm4_deploy.quantized_source import quantization
    from glm4_deploy.side_files import compare_side_files
    from glm4_exporters.architecture import parameter_count
    from glm4_exporters.checkpoint import Checkpoint
    from glm4_exporters.targets import TARGETS

    with Checkpoint.load(path) as checkpoint:
        config = checkpoint.config
        stored: dict[str, int] = {}
        for header in checkpoint.stored.values():
            stored[header.dtype] = stored.get(header.dtype, 0) + header.nbytes
        sizes = weight_bytes(config, checkpoint.task)
        kv_fp16 = config.kv_bytes_per_token(2)
        return {
            "kind": "checkpoint",
            "path": str(path),
            "task": checkpoint.task,
            "config": config.to_dict(),
            "max_positions": config.positions,
            "tensors": len(checkpoint.tensors),
            "parameters": parameter_count(config, checkpoint.task),
            "stored_bytes": stored,
            "quantization": quantization(checkpoint),
            "bytes_by_precision": sizes,
            "kv_bytes_per_token": {"fp32": 2 * kv_fp16, "fp16 or bf16": kv_fp16, "int8": kv_fp16 // 2},
            "fits": {f"{memory} GiB": _fitting(sizes, kv_fp16, memory) for memory in MEMORIES},
            "targets": {name: list(target.precisions) for name, target in TARGETS.items()},
            "end_tokens": end_tokens(path, config.eos_token_id),
            "files": sorted(checkpoint.side_files()),
            "warnings": _warnings(lambda: compare_side_files(checkpoint), "export refuses this checkpoint"),
        }


def weight_bytes(config: "Glm4Config", task: str) -> dict[str, int]:
    """Bytes of the weights in each precision, by the precision's label."""
    from glm4_exporters.architecture import expected_tensors
    from glm4_exporters.form import choose_form

    shapes = expected_tensors(config, task)
    return {
        label: choose_form(config, task, "ort", name).weight_bytes(shapes)
        for label, name in SHOWN_PRECISIONS.items()
    }


def _fitting(sizes: Mapping[str, int], kv_per_token: int, gib: int) -> list[str]:
    """Precisions whose weights and one slot of 8192 fp16 positions take at most 90 % of the memory."""
    room = 0.9 * gib * 2**30 - ASSUMED_CONTEXT * kv_per_token
    return [label for label, size in sizes.items() if size <= room]


def inspect_bundle(path: Path) -> dict[str, Any]:
    from glm4_runtime.side_files import check_bundle

    manifest = read_manifest(path)
    report = path / REPORT
    return {
        "kind": "bundle",
        "path": str(path),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "kv_bytes_per_token": _kv_bytes(manifest),
        "checked_at_opening": checked_at_opening(manifest),
        "end_tokens": end_tokens(path, manifest.model.eos_token_ids),
        "manifest": json.loads((path / MANIFEST).read_text("utf-8")),
        "report": _read_report(report) if report.is_file() else None,
        "warnings": _warnings(
            lambda: check_bundle(path, manifest, _tokenizer(path, manifest)), "no command opens this bundle"
        ),
    }


def _warnings(compare: Callable[[], list[str]], consequence: str) -> list[str]:
    """The warnings about side files; if a comparison refuses the files, its error and the consequence."""
    try:
        return compare()
    except Glm4Error as error:
        return [f"{consequence}: {error}"]


def _tokenizer(path: Path, manifest: Manifest) -> "Tokenizer | None":
    from glm4_runtime.tokenizer import Tokenizer

    return Tokenizer.from_folder(path) if TOKENIZER in manifest.files else None


def _read_report(path: Path) -> Any:
    return read_object(path, BundleError, "delete it, or export the bundle again")


def _kv_bytes(manifest: Manifest) -> int | None:
    if manifest.kv_cache is None:
        return None
    model = manifest.model
    row = CACHE_TYPES[manifest.kv_cache].row_bytes(model.head_dim)
    return 2 * model.num_layers * model.num_kv_heads * row
