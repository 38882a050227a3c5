"""The text that belongs to a model: similar to its training data, in the folder of a checkpoint or a bundle.

:mod:`glm4_deploy.texts` reads it. This file imports nothing that computes, so that commands start quickly.
"""

import shutil
from pathlib import Path

from glm4_runtime.errors import TextError

IDS = ".ids"
SUFFIXES = (".txt", ".jsonl", IDS)
OWN_TEXT = "heldout"  # with one of the suffixes
MOST_KEPT = 16 << 20  # bytes of text that a bundle keeps


def own_text(*folders: Path) -> Path | None:
    """The text that belongs to a model: ``heldout.txt``, ``.jsonl`` or ``.ids`` of the first folder that has one."""
    paths = (folder / f"{OWN_TEXT}{suffix}" for folder in folders for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def require_small(text: Path) -> None:
    """Refuse a text that is too large for a bundle.

    Raises:
        TextError: naming the largest size.
    """
    if text.stat().st_size > MOST_KEPT:
        raise TextError(
            f"{text} is larger than {MOST_KEPT >> 20} MiB, the most that a bundle keeps; give a part of it by --text"
        )


def keep_text(text: Path, folder: Path) -> None:
    """Copy the user's text into a bundle, as the bundle's own."""
    shutil.copyfile(text, folder / f"{OWN_TEXT}{text.suffix}")
