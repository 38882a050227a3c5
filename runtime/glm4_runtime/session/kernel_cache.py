"""Kernels that TensorRT-RTX has compiled for this GPU, kept for the next time the same engine is opened."""

import contextlib
import os
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where caches of ours lie: ``glm4-deploy`` under XDG_CACHE_HOME, or under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm4-deploy"


class KernelCache:
    """One file per engine and GPU. A file that TensorRT-RTX refuses, or that cannot be written, costs time only."""

    def __init__(self, config: Any, engine_sha256: str, capability: str) -> None:
        self.path = cache_folder() / f"{engine_sha256[:32]}-{capability}.kernels"
        self.cache = config.create_runtime_cache()
        self._stored = b""
        with contextlib.suppress(OSError):
            stored = self.path.read_bytes()
            if self.cache.deserialize(stored):
                self._stored = stored

    def save(self) -> None:
        """Write what was compiled since, aside and renamed, so that two processes never mix."""
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
