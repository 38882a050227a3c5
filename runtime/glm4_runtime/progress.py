"""Progress reports of long work. The caller decides how to show them; the default shows nothing."""

from typing import Protocol


class Progress(Protocol):
    """Called during work with the stage's name, the amount done, and the total (0 if unknown)."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""
