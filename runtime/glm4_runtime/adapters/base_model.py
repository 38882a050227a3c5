"""Checks by name that an adapter was trained on the checkpoint's model.

Released models of one size have equal shapes, so only their names differ.
"""

import re
from pathlib import Path

from glm4_runtime.errors import CheckpointError, shown

# The released models: last part of the name, with hidden size and number of layers.
SIZE_9B, SIZE_32B = (4096, 40), (6144, 61)
RELEASED = {
    "glm-4-9b-0414": SIZE_9B,
    "glm-4-32b-0414": SIZE_32B,
    "glm-4-32b-base-0414": SIZE_32B,
    "glm-z1-9b-0414": SIZE_9B,
    "glm-z1-32b-0414": SIZE_32B,
    "glm-z1-rumination-32b-0414": SIZE_32B,
}
ON_A_HUB = re.compile(r"[\w.-]+/([\w.-]+)")
SET_BASE = "if the adapter is right, correct base_model_name_or_path in its adapter_config.json"


def require_base(
    adapter: Path,
    base: str | None,
    ours: frozenset[str],
    size: tuple[int, int],
    checkpoint: Path | None = None,
) -> None:
    """Refuse an adapter if its base model is surely not ours. Unknown names are accepted.

    Args:
        base: name or folder of the base model. None: the adapter names none, and is accepted.
        ours: possible names of our model, by :func:`names_of`.
        size: our model's hidden size and number of layers.
        checkpoint: our model's folder, if it is at hand.

    Raises:
        CheckpointError: the base model is another released model, or a model of another family.
    """
    if base is None or (checkpoint is not None and _same_folder(base, checkpoint)) or _last(base) in ours:
        return
    theirs = _last(base)
    sizes = RELEASED.get(theirs)
    others = sorted(ours & RELEASED.keys())
    if sizes is not None and (others or sizes != size):
        _refuse(adapter, base, others[0] if others else str(checkpoint or "this bundle's model"))
    if ON_A_HUB.fullmatch(base) and "glm" not in theirs and not Path(base).exists():
        _refuse(adapter, base, others[0] if others else str(checkpoint or "this bundle's model"))


def _refuse(adapter: Path, base: str, ours: str) -> None:
    raise CheckpointError(
        f"{adapter} was trained on {shown(base)}, not on {ours}; give the checkpoint of that model; {SET_BASE}"
    )


def _same_folder(base: str, checkpoint: Path) -> bool:
    try:
        return Path(base).samefile(checkpoint)
    except (OSError, ValueError):
        return False


def names_of(checkpoint: Path) -> frozenset[str]:
    """The possible names of a checkpoint in lower case: its folder's, and its repository's in a hub cache."""
    parts = checkpoint.resolve().parts
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return frozenset(name.lower() for name in (*parts[-1:], *cached[-1:]))


def released_name(checkpoint: Path) -> str | None:
    """The name of the released model in the checkpoint's folder, by the folder's name. None: no such name."""
    return min(names_of(checkpoint) & RELEASED.keys(), default=None)


def _last(base: str) -> str:
    return re.split(r"[/\\]", base.rstrip("/\\"))[-1].lower()
