"""The cache key of an export: equal keys mean equal bundles."""

import dataclasses
import hashlib
import json
from pathlib import Path

from glm4_deploy.plan import ExportOptions, make_plan
from glm4_deploy.tools import tool_versions
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.engine.gpu import gpu_identity
from glm4_exporters.engine.kinds import engine_version
from glm4_runtime.bundle import SCHEMA_VERSION
from glm4_runtime.errors import ExportError


def cache_key(checkpoint: str | Path, options: ExportOptions, by_content: bool = False) -> str:
    """SHA-256 of everything that decides the bundle's bytes, without reading a weight unless ``by_content``.

    Hashes the options, the versions of our package and of the tools that determine a bundle, and the checkpoint's
    fingerprint: its configuration, its tensor headers, and the identity of each shard. A shard in a hub cache is
    identified by its content hash, any other by its size and time of change. With ``by_content`` such a shard is read
    and hashed, so that a new download has the same key. If kernels are timed on the GPU of this machine, the GPU's
    model is part of the key.
    """
    with Checkpoint.load(checkpoint, options.task, options.adapters) as source:
        plan = make_plan(source, options)
        shaping = {
            name: value for name, value in dataclasses.asdict(plan.options).items() if name != "parity"
        }
        del shaping["adapters"]  # the checkpoint's fingerprint has them
        del shaping["engine"]["timing_cache"]  # only saves time, and its path differs between machines
        for name in ("calibration", "recipe", "text"):  # their contents, independent of their paths
            shaping[name] = shaping[name] and _sha256(Path(shaping[name]))
        built = {} if plan.engine is None else {plan.engine.kind: engine_version(plan.engine.kind)}
        parts = {
            "schema": SCHEMA_VERSION,
            "options": shaping
            | {"kept": plan.form.kept}
            | {"task": source.task}
            | dataclasses.asdict(plan.limits),
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
