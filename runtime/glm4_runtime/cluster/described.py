"""The facts of a bundle that the server of replicas needs."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from glm4_runtime.bundle import Manifest, read_manifest
from glm4_runtime.bundle.file_names import TOKENIZER
from glm4_runtime.errors import RequestError
from glm4_runtime.opening import check_opening
from glm4_runtime.places import PROCESS, RAY
from glm4_runtime.session import RUNTIMES, STAGED_ON_RAY, limits_of, require_place
from glm4_runtime.side_files import check_bundle
from glm4_runtime.tokenizer import Tokenizer


def place_of(manifest: Manifest, options: Mapping[str, Any]) -> str:
    """Where the stages of each replica run. ``options``: of its session."""
    may_use_ray = manifest.stages and RUNTIMES.get(manifest.dialect) in STAGED_ON_RAY
    return options.get("stages_on") or (RAY if may_use_ray else PROCESS)


class DescribedBundle:
    """The facts of a bundle that replicas open; implements ``OpenBundle``. It loads no weights."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        """Raises :class:`BundleError` if the bundle is damaged, and :class:`RequestError` if it does not generate."""
        self.folder, self.manifest = folder, read_manifest(folder)
        if self.manifest.task != "causal-lm":
            raise RequestError(
                f"this bundle was exported for {self.manifest.task}; replicas need causal-lm: serve it without --replicas"
            )
        self.max_seq_len, _ = limits_of(
            self.manifest, options.get("max_seq_len"), options.get("max_batch_size")
        )
        on_ray = require_place(folder, self.manifest, place_of(self.manifest, options))
        check_opening(folder, self.manifest, hashes=bool(options.get("verify")), stages=not on_ray)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_folder(self.folder) if TOKENIZER in self.manifest.files else None

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(check_bundle(self.folder, self.manifest, self.tokenizer))

    def close(self) -> None:
        """Nothing is open."""
