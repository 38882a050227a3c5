"""Sessions: one interface, one file per runtime. The bundle's dialect decides which runtime opens it."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from glm4_runtime.bundle import Manifest, read_manifest
from glm4_runtime.bundle.file_names import TOKENIZER
from glm4_runtime.bundle.manifest_checks import ONNX_RUNTIME
from glm4_runtime.errors import BundleError
from glm4_runtime.opening import check_opening
from glm4_runtime.places import PLACES, PROCESS, RAY
from glm4_runtime.session.base import Session
from glm4_runtime.tokenizer import start_trial

# The runtime of each dialect.
RUNTIMES = {
    "ort": ONNX_RUNTIME,
    "cpu": ONNX_RUNTIME,
    "native": ONNX_RUNTIME,
    "tensorrt-rtx": "tensorrt-rtx",
    "tensorrt": "tensorrt",
}
# Module and class of each runtime; imported when chosen, because the runtime may not be installed.
SESSIONS = {
    ONNX_RUNTIME: ("glm4_runtime.session.ort", "OrtSession"),
    "tensorrt-rtx": ("glm4_runtime.session.tensorrt", "TensorRtSession"),
    "tensorrt": ("glm4_runtime.session.tensorrt", "TensorRtSession"),
}
# Module and function that open a bundle of stages.
STAGED = {
    ONNX_RUNTIME: ("glm4_runtime.session.ort_stage", "open_stages"),
    "tensorrt-rtx": ("glm4_runtime.session.engine_stage", "open_engine_stages"),
    "tensorrt": ("glm4_runtime.session.engine_stage", "open_engine_stages"),
}
STAGED_ON_RAY = {
    ONNX_RUNTIME: ("glm4_runtime.cluster.stages", "open_stages"),
}


def open_session(
    folder: Path,
    *,
    provider: str | None,
    max_seq_len: int | None,
    max_batch_size: int | None,
    threads: int | None,
    verify: bool,
    stages_on: str,
) -> Session:
    """See :meth:`Session.open`."""
    if threads is not None and threads < 1:
        raise BundleError(f"threads is {threads}, but must be at least 1")
    manifest = read_manifest(folder)
    if manifest.dialect not in RUNTIMES:
        raise BundleError(
            f"{folder} holds a graph in the dialect {manifest.dialect!r}; this runtime opens {', '.join(sorted(RUNTIMES))}"
        )
    limits = limits_of(manifest, max_seq_len, max_batch_size)
    on_ray = require_place(folder, manifest, stages_on)
    check_opening(folder, manifest, hashes=verify, stages=not on_ray)
    if TOKENIZER in manifest.files:
        start_trial(folder)
    options: dict[str, Any] = {"provider": provider, "threads": threads}
    if on_ray:
        options["verify"] = verify
    table = STAGED_ON_RAY if on_ray else STAGED if manifest.stages else SESSIONS
    module, name = table[RUNTIMES[manifest.dialect]]
    make = cast("Callable[..., Session]", getattr(import_module(module), name))
    session = make(folder, manifest, *limits, **options)
    session.threads = threads
    return session


def require_place(folder: Path, manifest: Manifest, stages_on: str) -> bool:
    """Whether the stages of a bundle run on Ray.

    Raises:
        BundleError: the bundle has no stages, or the place is unknown.
    """
    if stages_on not in PLACES:
        raise BundleError(f"stages_on is {stages_on!r}, but must be {' or '.join(PLACES)}")
    if stages_on == RAY and not manifest.stages:
        raise BundleError(f"{folder} has no stages to run on Ray; export it with --stages 2")
    if stages_on == RAY and RUNTIMES[manifest.dialect] not in STAGED_ON_RAY:
        raise BundleError(
            f"stages of target {manifest.target} do not run on Ray; open {folder} with stages_on {PROCESS!r}"
        )
    return stages_on == RAY


def limits_of(manifest: Manifest, max_seq_len: int | None, max_batch_size: int | None) -> tuple[int, int]:
    """The limits of a session that asks for these, or for the bundle's. Raises :class:`BundleError` beyond those."""
    result = []
    for name, asked in (("max_seq_len", max_seq_len), ("max_batch_size", max_batch_size)):
        limit = getattr(manifest.limits, name)
        if asked is not None and not 1 <= asked <= limit:
            raise BundleError(
                f"{name} is {asked}, but this bundle allows 1 ... {limit}; export it with a higher limit"
            )
        result.append(limit if asked is None else asked)
    return result[0], result[1]


__all__ = ["Session", "limits_of", "open_session", "require_place"]
