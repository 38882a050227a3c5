"""The table of the two TensorRTs."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from glm4_runtime.errors import ExportError
from glm4_runtime.install import install_command

ATTENTIONS = ("plugin", "plugin-small", "native")


@dataclass(frozen=True)
class EngineKind:
    """One of the two TensorRTs.

    Attributes:
        capabilities: compute capabilities that it can build for; empty if it builds for the GPU of this machine.
        default: capabilities that an engine runs on if none is named; also all later ones.
        times: whether it times kernels during a build. This needs a GPU, and makes a timing cache useful.
        attention: possible ways to run attention, the default first.
        rtx: whether Polygraphy must load TensorRT-RTX (``POLYGRAPHY_USE_TENSORRT_RTX``).
        index: text after "install PACKAGE", if its libraries are not on the public index.
    """

    module: str
    package: str
    capabilities: tuple[str, ...]
    default: tuple[str, ...]
    times: bool
    attention: tuple[str, ...]
    rtx: bool = False
    index: str = ""


ENGINE_KINDS = {
    "tensorrt-rtx": EngineKind(
        "tensorrt_rtx",
        "tensorrt-rtx",
        ("75", "80", "86", "89", "120", "121"),
        ("80", "86", "89", "120"),
        times=False,
        attention=("native",),  # it has no plugins, and an unknown node ends the process
        rtx=True,
    ),
    "tensorrt": EngineKind(
        "tensorrt",
        "tensorrt",
        (),
        (),
        times=True,
        attention=ATTENTIONS,
        index=" with NVIDIA's package index as --extra-index-url (docs/tensorrt.md)",
    ),
}


def engine_version(kind_name: str) -> str:
    """Version of the installed builder, without importing the builder."""
    kind = ENGINE_KINDS[kind_name]
    try:
        return version(kind.package)
    except PackageNotFoundError:
        raise ExportError(
            f"{kind_name} is not installed, which target {kind_name} needs; "
            f"run {install_command(kind_name)}{kind.index}"
        ) from None
