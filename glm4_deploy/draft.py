"""The option --draft."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glm4_deploy import folders

if TYPE_CHECKING:
    from glm4_runtime import Session
    from glm4_runtime.drafted import DraftedGeneration
    from glm4_runtime.prefix_store.store import PrefixStore


def draft_option(function: Callable[..., None]) -> Callable[..., None]:
    """Add --draft to a command."""
    return click.option(
        "--draft",
        type=click.Path(path_type=Path),
        metavar="BUNDLE",
        help="Bundle of a smaller model with the same tokenizer. Its guesses make generation faster and change no token.",
    )(function)


@contextlib.contextmanager
def drafted(
    session: "Session", draft: Path | None, store: "PrefixStore | None"
) -> "Iterator[DraftedGeneration | None]":
    """Generation with the draft model in a folder, until the end of the block. None without a folder."""
    if draft is None:
        yield None
        return
    folders.require_generator(draft)
    from glm4_runtime.draft_model import open_draft
    from glm4_runtime.drafted import DraftedGeneration

    with DraftedGeneration(session, open_draft(session, draft), store) as generation:
        yield generation
