"""The facts of a bundle that the server of replicas needs."""

from functools import cached_property
from pathlib import Path
from typing import Any

from glm4_runtime.bundle import read_manifest
from glm4_runtime.bundle.file_names import TOKENIZER
from glm4_runtime.errors import RequestError
from glm4_runtime.opening import check_opening
from glm4_runtime.session import limits_of
from glm4_runtime.side_files import check_bundle
from glm4_runtime.tokenizer import Tokenizer


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
        check_opening(folder, self.manifest, hashes=bool(options.get("verify")))

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_folder(self.folder) if TOKENIZER in self.manifest.files else None

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(check_bundle(self.folder, self.manifest, self.tokenizer))

    def close(self) -> None:
        """Nothing is open."""
