"""The cache key of an export: equal keys mean equal bundles."""

import dataclasses
import hashlib
import json
from pathlib import Path

from glm4_deploy.plan import ExportOptions, make_plan
from glm4_deploy.tools import tool_versions
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.engine import engine_version, gpu_identity
from glm4_runtime.bundle import SCHEMA_VERSION
from glm4_runtime.errors import ExportError


def cache_key(checkpoint: str | Path, options: ExportOptions, by_content: bool = False) -> str:
    """SHA-256 of everything that decides the bundle's bytes, without reading a weight unless ``by_content``.

    Options, versions of our package and the tools that shape a bundle, and the checkpoint's fingerprint:
    its configuration, its tensor headers, and per shard the content hash under which a hub cache stores
    it, or else size and modification time. An engine whose kernels are chosen on the GPU of this machine has that
    GPU's model in its key. ``by_content`` reads and hashes such a shard instead, so that a
    fresh download has the same key.
    """
    with Checkpoint.load(checkpoint, options.task, options.adapters) as source:
        plan = make_plan(source, options)
        shaping = {name: value for name, value in dataclasses.asdict(options).items() if name != "parity"}
        del shaping["adapters"]  # the checkpoint's fingerprint has them
        del shaping["engine"]["timing_cache"]  # saves time, and lies elsewhere on each machine
        for name in ("calibration", "recipe"):  # what they hold, wherever they lie
            shaping[name] = shaping[name] and _sha256(Path(shaping[name]))
        built = {} if plan.engine is None else {plan.engine.kind: engine_version(plan.engine.kind)}
        parts = {
            "schema": SCHEMA_VERSION,
            "options": shaping | {"task": source.task} | dataclasses.asdict(plan.limits),
            "tools": tool_versions() | built,
            "gpu": gpu_identity() if plan.engine is not None and plan.engine.timed else None,
            "checkpoint": source.fingerprint(by_content),
        }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
