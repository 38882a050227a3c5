"""The options --stages-on and --ray-address, and the cluster that they name."""

import contextlib
from collections.abc import Callable, Iterator

import click

from glm4_runtime.places import PLACES, PROCESS, RAY


def stages_on_option(default: str | None, words: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option --stages-on of a command."""
    return click.option("--stages-on", type=click.Choice(PLACES), default=default, help=words)


def stage_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add --stages-on and --ray-address to a command that opens a session."""
    place = stages_on_option(
        PROCESS,
        f"Where the stages of a bundle with --stages run: in this {PROCESS}, or on {RAY}'s nodes. Default: {PROCESS}. "
        f"{RAY} needs the extra ray.",
    )
    address = click.option(
        "--ray-address",
        metavar="ADDRESS",
        help="Running Ray cluster to join, such as auto or 10.0.0.1:6379. Default: start one on this machine.",
    )
    return place(address(function))


@contextlib.contextmanager
def joined(stages_on: str, ray_address: str | None) -> Iterator[None]:
    """Join the cluster at an address until the end of the block. Without one, the session starts a cluster itself.

    Raises:
        click.UsageError: an address without stages on Ray. UnavailableError: no cluster answers.
    """
    if ray_address is None:
        yield
        return
    if stages_on != RAY:
        raise click.UsageError(f"--ray-address goes with --stages-on {RAY}")
    from glm4_runtime.cluster.ray_module import require_ray
    from glm4_runtime.cluster.start import connect

    connect(ray_address)
    try:
        yield
    finally:
        require_ray().shutdown()
