"""The option ``--lora``: adapters to merge into a checkpoint's weights, or one to apply to a bundle at run time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from glm4_deploy import hub
from glm4_runtime.errors import RequestError
from glm4_runtime.progress import Progress, silent

if TYPE_CHECKING:
    from glm4_runtime import Session

Command = TypeVar("Command", bound=Callable[..., None])


def lora_option(command: Command) -> Command:
    """Add the repeatable option ``--lora`` to a click command."""
    return click.option(
        "--lora",
        multiple=True,
        metavar="DIR[=SCALE]",
        help="LoRA adapter to merge into the weights: a folder as PEFT saves it, or a name on the hub. "
        "Repeat the option for several.",
    )(command)


def run_time_lora_option(command: Command) -> Command:
    """Add the option ``--lora`` of a command that runs a bundle."""
    return click.option(
        "--lora",
        metavar="DIR",
        help="LoRA adapter to apply: a folder as PEFT saves it, or a name on the hub. For bundles exported with --lora-slots.",
    )(command)


def apply_adapter(session: "Session", given: str | None) -> None:
    """Load the adapter of ``--lora`` for all sequences of a session. None: no adapter.

    Raises:
        BundleError: the bundle takes no adapters. CheckpointError: the adapter is damaged or does not fit.
    """
    if given is not None:
        session.load_adapter(given, hub.local_folder(given))
        session.adapter = given


def find_adapters(given: Sequence[str], progress: Progress = silent) -> tuple[tuple[str, float], ...]:
    """The folder and the factor of each adapter. An adapter named by its hub repository is downloaded.

    Raises:
        RequestError: a scale is not a number.
        CheckpointError: the hub has no repository of this name.
    """
    found = []
    for value in given:
        name, scale = _parted(value)
        found.append((str(hub.local_folder(name, progress=progress)), scale))
    return tuple(found)


def _parted(value: str) -> tuple[str, float]:
    """Split ``DIR=SCALE`` into folder and factor. An existing folder with "=" in its name is not split."""
    name, equals, scale = value.rpartition("=")
    if not equals or Path(value).exists():
        return value, 1.0
    try:
        return name, float(scale)
    except ValueError:
        raise RequestError(
            f"--lora {value}: {scale!r} is not a number; give a factor, as {name}=0.5"
        ) from None
