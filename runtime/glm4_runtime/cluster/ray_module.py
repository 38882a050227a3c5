"""Ray, which only servers with replicas need."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from glm4_runtime.errors import UnavailableError
from glm4_runtime.install import install_command


def require_installed() -> None:
    """Raises :class:`UnavailableError`, with the command that installs Ray, if Ray is missing. Imports nothing."""
    if find_spec("ray") is None:
        raise UnavailableError(f"--replicas and --stages-on ray need Ray; run {install_command('ray')}")


def require_ray() -> Any:
    """The module, after the check of :func:`require_installed`."""
    require_installed()
    return import_module("ray")
