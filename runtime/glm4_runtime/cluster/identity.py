"""What must be equal on all replicas, and on all stages of one model."""

import contextlib
import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import glm4_runtime
from glm4_runtime.adapters import AdapterFolder
from glm4_runtime.bundle import Manifest
from glm4_runtime.cluster.order import Identity
from glm4_runtime.session import Session


def identity(session: Session, adapters: Sequence[tuple[str, str]] = ()) -> Identity:
    """What must be equal on all replicas. ``adapters``: name and folder of each."""
    return Identity(
        bundle=_bundle(session.manifest),
        code=code_digest(),
        kernels=_kernels(session),
        target=f"{session.manifest.target} on {session.provider}",
        limits=(session.max_seq_len, session.max_batch_size),
        adapters=tuple((name, _adapter(folder)) for name, folder in adapters),
    )


def _bundle(manifest: Manifest) -> str:
    lines = [f"{name} {entry.sha256}" for name, entry in sorted(manifest.files.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _adapter(folder: str) -> str:
    adapter = AdapterFolder(folder)
    try:
        return adapter.sha256()
    finally:
        adapter.close()


def code_digest() -> str:
    """SHA-256 of the runtime's source files."""
    root = Path(glm4_runtime.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _kernels(session: Session) -> str:
    """Digest of our CPU kernels, with the versions of the packages that compute, here and in stages elsewhere."""
    found = find_spec("glm4_plugins")
    folders = list(found.submodule_search_locations or ()) if found else []
    libraries = [file for folder in folders for file in sorted(Path(folder).glob("cpu_operators*"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in libraries[:1]))
    for package in ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "llguidance"):
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"{package} {version(package)}".encode())
    digest.update(f"{platform.machine()} {sorted(session.kernels.items())}".encode())
    return digest.hexdigest()
