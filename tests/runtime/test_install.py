"""The commands that messages give for an extra install it from where this package came from."""

import json
import re
import runpy
import shlex
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import Distribution, Extension

from glm4_runtime import install
from glm4_runtime.install import install_command, requirements_of

ROOT = Path(__file__).parents[2]
METADATA = """Metadata-Version: 2.4
Name: glm4-deploy
Version: 0.1.0
Provides-Extra: cuda
Provides-Extra: hub
Requires-Dist: click>=8.1
Requires-Dist: colorama; sys_platform == "none"
Requires-Dist: onnxruntime-gpu[cudnn,cuda]>=1.30; extra == "cuda"
Requires-Dist: cuda-bindings>=13.0; extra == "cuda"
Requires-Dist: huggingface-hub>=1.0; extra == "hub"
Requires-Dist: tzdata; sys_platform == "none" and extra == "hub"
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function: the package lies in a folder of packages, as pip left it, with this ``direct_url.json``."""
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    (site / "glm4_runtime").mkdir(parents=True)
    info = site / "glm4_deploy-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    monkeypatch.setattr(install, "__file__", str(site / "glm4_runtime" / "install.py"))
    monkeypatch.syspath_prepend(site)

    def from_where(direct_url=None):
        install._origin.cache_clear()
        if direct_url is not None:
            (info / "direct_url.json").write_text(json.dumps(direct_url))

    yield from_where
    install._origin.cache_clear()


def words(*extras):
    """The command as a shell splits it, after pip and ``install``."""
    found = shlex.split(install_command(*extras))
    return found[found.index("install") + 1 :]


def test_in_a_checkout_its_folder_is_named():
    assert words("cpu", "export") == ["--editable", f"{ROOT}[cpu,export]"]


def test_from_an_index_the_name_alone_is_right(installed):
    installed()
    assert words("cpu", "export") == ["glm4-deploy[cpu,export]"]


def test_from_a_wheel_or_a_folder_its_address_is_named(installed, tmp_path):
    wheel = tmp_path / "a folder" / "glm4_deploy-0.1.0-py3-none-linux_x86_64.whl"
    wheel.parent.mkdir()
    wheel.touch()
    for path, kind in ((wheel, {"archive_info": {}}), (wheel.parent, {"dir_info": {}})):
        installed({"url": path.as_uri(), **kind})
        assert words("hub") == [f"glm4-deploy[hub] @ {path.as_uri()}"]
        assert Requirement(words("hub")[0]).url == path.as_uri()


def test_a_repository_is_named_with_its_commit(installed):
    version = {"vcs": "git", "commit_id": "1234abcd", "requested_revision": "main"}
    installed({"url": "https://host.example/deploy.git", "vcs_info": version, "subdirectory": "python"})
    address = "git+https://host.example/deploy.git@1234abcd#subdirectory=python"
    assert words("hub") == [f"glm4-deploy[hub] @ {address}"]


def test_where_the_wheel_is_gone_the_packages_themselves_are_named(installed, tmp_path):
    installed({"url": (tmp_path / "gone.whl").as_uri(), "archive_info": {}})
    assert words("cuda", "hub") == [
        "onnxruntime-gpu[cuda,cudnn]>=1.30", "cuda-bindings>=13.0", "huggingface-hub>=1.0",
    ]  # fmt: skip


def test_requirements_of_another_machine_are_left_out(installed):
    installed()
    assert [one.name for one in requirements_of("glm4-deploy")] == ["click"]
    assert [one.name for one in requirements_of("glm4-deploy", "hub")] == ["huggingface-hub"]


def test_the_pip_of_another_python_is_not_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "python"))
    monkeypatch.setattr("shutil.which", lambda _: str(tmp_path / "my env" / "pip"))
    assert install_command("cpu").startswith("pip install ")
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/pip")
    assert install_command("cpu").startswith(f"'{tmp_path}/my env/python' -m pip install ")
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert " -m pip install " in install_command("cpu")


@pytest.fixture
def build(monkeypatch):
    """The build's own commands, by their names in setuptools, of a project with a compiled library."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    commands = runpy.run_path(str(ROOT / "setup.py"))
    library = Extension("glm4_plugins.cpu_operators", ["library.cpp"])
    project = Distribution({"name": "glm4-deploy", "ext_modules": [library]})
    made = commands["PlatformWheel"](project), commands["PlainLibrary"](project)
    for command in made:
        command.finalize_options()
    return *made, library


def test_one_wheel_serves_every_python(build):
    python, abi, platform = build[0].get_tag()
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_the_cpu_library_has_no_pythons_name(build):
    _, command, library = build
    found = Path(command.get_ext_filename(library.name))
    assert found.with_suffix("") == Path("glm4_plugins/cpu_operators")
    assert found.suffix in EXTENSION_SUFFIXES
    assert not command.get_export_symbols(library)


def test_no_text_of_ours_names_an_index_that_has_not_the_package():
    """Messages ask :func:`install_command`; README and docs install from a checkout or a wheel."""
    shown = [*ROOT.glob("*.md"), *ROOT.glob("docs/*"), *ROOT.glob("demo/**/*.md")]
    code = [
        path
        for part in ("glm4_deploy", "exporters", "runtime", "plugins")
        for path in (ROOT / part).rglob("*.py")
    ]
    lines = {line for path in (*shown, *code) if path.is_file() for line in path.read_text("utf-8").splitlines()}  # fmt: skip
    assert [line for line in lines if re.search(r"glm4-deploy\[[a-z,-]+\](?! @ )", line)] == []
