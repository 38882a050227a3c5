"""The parts of the build that pyproject.toml cannot say: the library of target cpu belongs to a platform, not to a Python."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 on one platform: py3-none-linux_x86_64."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class PlainLibrary(build_ext):
    """A library without a Python's tag in its name (.so, .pyd) and without a module's entry point."""

    def get_ext_filename(self, fullname: str) -> str:
        tagged = Path(super().get_ext_filename(fullname))
        return str(tagged.with_name(fullname.rpartition(".")[2] + tagged.suffix))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


setup(cmdclass={"bdist_wheel": PlatformWheel, "build_ext": PlainLibrary})
