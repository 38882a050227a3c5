"""The command that installs an extra of this package, from the source of this installation.

Slow imports happen inside functions, because every command's help loads this module.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "glm4-deploy"


def install_command(*extras: str) -> str:
    """The shell command that adds ``extras`` to this installation.

    It names the checkout that the package runs from, or the wheel, folder or repository that pip took the package
    from (``direct_url.json``, PEP 610). It names the package alone if pip took it from an index.
    """
    return f"{pip_command()} install {_source(','.join(extras))}"


def requirements_of(package: str, extra: str = "") -> list["Requirement"]:
    """The requirements of ``extra`` of an installed package on this machine; without ``extra``, its general
    requirements.

    Raises:
        PackageNotFoundError: the package is not installed.
    """
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    found = [Requirement(text) for text in requires(package) or ()]
    of_extra = [one for one in found if one.marker and "extra" in str(one.marker)]
    if extra:
        return [one for one in of_extra if one.marker and one.marker.evaluate({"extra": extra})]
    return [one for one in found if one not in of_extra and (not one.marker or one.marker.evaluate())]


def _source(extras: str) -> str:
    checkout = Path(__file__).parents[2]
    if (checkout / "runtime").is_dir() and (checkout / "pyproject.toml").is_file():
        return f"--editable {_quoted(f'{checkout}[{extras}]')}"
    origin = _origin()
    if origin.startswith("file:") and not _path(origin).exists():  # the wheel or folder is gone
        return _by_requirements(extras.split(","))
    return _quoted(f"{DISTRIBUTION}[{extras}]" + (f" @ {origin}" if origin else ""))


@cache
def _origin() -> str:
    """The URL that pip took the package from; empty if from an index."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        text = distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:
        return ""
    return _url(json.loads(text)) if text else ""


def _url(direct: dict[str, Any]) -> str:
    """The URL of a ``direct_url.json``, in the form of a requirement for pip."""
    url, version = direct["url"], direct.get("vcs_info")
    if version:
        url = f"{version['vcs']}+{url}@{version['commit_id']}"
    return f"{url}#subdirectory={direct['subdirectory']}" if "subdirectory" in direct else url


def _path(url: str) -> Path:
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    return Path(url2pathname(urlsplit(url).path))


def _by_requirements(extras: Iterable[str]) -> str:
    found = [one for extra in extras for one in requirements_of(DISTRIBUTION, extra)]
    names = (f"{one.name}[{','.join(sorted(one.extras))}]" if one.extras else one.name for one in found)
    parts = [f"{name}{one.specifier}" for name, one in zip(names, found, strict=True)]
    return " ".join(map(_quoted, dict.fromkeys(parts)))


def pip_command() -> str:
    """The pip of this Python, because another Python's may be first on PATH."""
    found, python = shutil.which("pip"), sys.executable or "python"
    if found and Path(found).parent == Path(python).parent:
        return "pip"
    return f"{python if python == shlex.quote(python) else _quoted(python)} -m pip"


def _quoted(text: str) -> str:
    """Quote for the shell, always, because zsh treats brackets as a pattern."""
    return f'"{text}"' if os.name == "nt" else shlex.quote(text)
