"""Refusals that need nothing but the manifest."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from glm4_runtime.bundle import Manifest
from glm4_runtime.errors import RequestError


def require_task(manifest: Manifest, tasks: str | tuple[str, ...], verb: str) -> None:
    """Raises :class:`RequestError` unless the bundle was exported for one of ``tasks``; ``verb`` is what needs it."""
    tasks = (tasks,) if isinstance(tasks, str) else tasks
    if manifest.task not in tasks:
        can = {"causal-lm": "generate and score", "encoder": "encode"}.get(manifest.task, "classify")
        raise RequestError(
            f"this bundle was exported for {manifest.task} and can {can}, not {verb}; "
            f"export the checkpoint with --task {tasks[0]}"
        )


def require_tokens(token_ids: Sequence[int] | npt.NDArray[np.int64], vocab_size: int) -> None:
    """Raises :class:`RequestError` for no tokens, and for what is no flat list of ids of the vocabulary."""
    if len(token_ids) == 0:
        raise RequestError("no tokens were given; a prompt needs at least one")
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RequestError(f"token ids must be a flat list of integers, not {ids.dtype} of shape {ids.shape}")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise RequestError(f"token id {wrong[0]} is outside the vocabulary 0 ... {vocab_size - 1}")
