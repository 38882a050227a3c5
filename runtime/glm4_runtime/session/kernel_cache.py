"""Saves the kernels that TensorRT-RTX compiled for this GPU, for the next session with the same engine."""

import contextlib
import os
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Our cache folder: ``glm4-deploy`` in XDG_CACHE_HOME, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm4-deploy"


class KernelCache:
    """One file per engine and GPU. If TensorRT-RTX refuses the file, or it cannot be written, kernels are compiled
    again."""

    def __init__(self, config: Any, engine_sha256: str, capability: str) -> None:
        self.path = cache_folder() / f"{engine_sha256[:32]}-{capability}.kernels"
        self.cache = config.create_runtime_cache()
        self._stored = b""
        with contextlib.suppress(OSError):
            stored = self.path.read_bytes()
            if self.cache.deserialize(stored):
                self._stored = stored

    def save(self) -> None:
        """Write newly compiled kernels to a temporary file and rename it, so that two processes never mix their data."""
        blob = self.cache.serialize()
        compiled = b"" if blob is None else bytes(blob)
        if compiled in (b"", self._stored):
            return
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(compiled)
            aside.replace(self.path)
            self._stored = compiled
