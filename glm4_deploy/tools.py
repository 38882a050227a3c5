"""The packages that an export needs, and the versions that determine its bundle."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from glm4_deploy import __version__
from glm4_deploy.plan import Plan
from glm4_runtime.errors import ExportError
from glm4_runtime.install import install_command

BUNDLE_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript")


def tool_versions() -> dict[str, str]:
    """Versions of our package, and of the tools that determine a bundle.

    Raises:
        ExportError: one of them is not installed.
    """
    versions = {"glm4-deploy": __version__}
    for name in BUNDLE_TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            raise ExportError(
                f"{name} is not installed, which export needs; run {install_command('export')}"
            ) from None
    return versions


def require_installed(plan: Plan) -> None:
    """Refuse a plan whose packages are missing, before the work.

    Raises:
        ExportError: the missing packages, and how to install them.
    """
    tool_versions()
    if not plan.options.parity:
        return
    if find_spec("onnxruntime") is None:
        raise ExportError(
            f"onnxruntime is not installed, which parity needs; run {install_command('cpu')}, or add --no-parity"
        )
    if plan.form.target.own_operators:
        from glm4_plugins import block_product

        if block_product.library() is None:
            raise ExportError(
                "the CPU operators, which parity needs, were not built when glm4-deploy was installed; install a C++ "
                "compiler and glm4-deploy again, or add --no-parity"
            )
