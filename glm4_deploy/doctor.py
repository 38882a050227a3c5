"""Lists installed packages, which targets and providers work here, and how to make the others work."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from glm4_runtime.install import DISTRIBUTION, install_command, pip_command, requirements_of

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# These two packages have the same import name and overwrite each other. Each extra needs one of them.
INSTEAD_OF = {"cpu": "onnxruntime-gpu", "cuda": "onnxruntime"}


@dataclass(frozen=True)
class Finding:
    """One feature that works or not; ``advice`` says how to make it work."""

    name: str
    works: bool
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Extra:
    """An extra of this package: its missing packages, and the command that installs them."""

    name: str
    installed: bool
    missing: tuple[str, ...]
    advice: str = ""


def examine() -> dict[str, object]:
    """All data of the ``doctor`` command; without packages and extras if our package is not installed."""
    findings, extras = [check() for check in CHECKS], _extra_names()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: found for name in _packages(extras) if (found := _version(name))},
        "extras": [vars(_extra(name)) for name in extras],
        "findings": [vars(finding) for finding in findings],
    }


def _extra_names() -> list[str]:
    """The names of the extras, from the metadata of the installed package."""
    try:
        return metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        return []


def _packages(extras: list[str]) -> list[str]:
    if not extras:
        return []
    found = [one for extra in ("", *extras) for one in requirements_of(DISTRIBUTION, extra)]
    return list(dict.fromkeys(one.name for one in found))


def _extra(name: str) -> Extra:
    from glm4_exporters.engine.kinds import ENGINE_KINDS

    missing = [part for one in requirements_of(DISTRIBUTION, name) for part in _lacking(one)]
    if not missing:
        return Extra(name, True, ())
    other = INSTEAD_OF.get(name)
    first = f"{pip_command()} uninstall {other}, then " if other and _version(other) else ""
    kind = ENGINE_KINDS.get(name)
    return Extra(name, False, tuple(missing), f"{first}{install_command(name)}{kind.index if kind else ''}")


def _lacking(one: "Requirement") -> list[str]:
    """The packages that are missing for a requirement, or have a wrong version."""
    found = _version(one.name)
    if found is None:
        return [one.name]
    if not one.specifier.contains(found, prereleases=True):
        return [f"{one.name}{one.specifier} (version {found} is installed)"]
    inner = [part for extra in sorted(one.extras) for part in requirements_of(one.name, extra)]
    return [name for part in inner for name in _lacking(part)]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _missing(*modules: str) -> list[str]:
    return [name for name in modules if find_spec(name) is None]


def _export() -> Finding:
    missing = _missing("torch", "onnx", "onnx_ir", "onnxscript")
    name = "export: targets ort, cpu and native"
    if missing:
        return Finding(name, False, f"{', '.join(missing)} not installed", install_command("cpu", "export"))
    parity = "" if not _missing("onnxruntime") else "; parity needs onnxruntime as well"
    return Finding(name, True, f"torch {_version('torch')}, onnx {_version('onnx')}{parity}")


def _onnxruntime() -> Finding:
    name = "run: ONNX Runtime"
    both = [p for p in ("onnxruntime", "onnxruntime-gpu") if _version(p)]
    if len(both) == 2:
        return Finding(
            name,
            False,
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
            f"{pip_command()} uninstall onnxruntime onnxruntime-gpu, then install one of them",
        )
    if _missing("onnxruntime"):
        return Finding(
            name, False, "not installed", f"{install_command('cpu')}, or with [cuda] on a GPU host"
        )
    try:
        import onnxruntime
    except ImportError as error:
        return Finding(name, False, f"cannot be imported: {error}", "reinstall it")
    return Finding(
        name, True, f"{onnxruntime.__version__} with {', '.join(onnxruntime.get_available_providers())}"
    )


def _cpu_operators() -> Finding:
    from glm4_plugins.block_product import VARIABLE, kernels

    name, advice = "run: target cpu", "install a C++ compiler, and glm4-deploy again"
    try:
        found = kernels()
    except (OSError, AttributeError) as error:  # for another platform, damaged, or of another version
        return Finding(name, False, f"its operators cannot be loaded: {error}", advice)
    except ValueError as error:
        return Finding(name, False, str(error), f"unset {VARIABLE}")
    if found is None:
        return Finding(name, False, "its operators were not built when glm4-deploy was installed", advice)
    return Finding(name, True, f"{found} kernels")


def _cuda() -> Finding:
    name = "run: CUDA provider"
    gpus = _gpus()
    if not gpus:
        return Finding(name, False, "no NVIDIA GPU or driver found (nvidia-smi)", "run on a GPU host")
    if not _version("onnxruntime-gpu"):
        return Finding(name, False, f"{gpus}, but onnxruntime-gpu is not installed", install_command("cuda"))
    if _missing("cuda"):
        return Finding(name, False, "cuda-bindings is not installed", install_command("cuda"))
    missing = _missing_cuda_libraries()
    if missing:
        return Finding(name, False, f"{gpus}, but {missing}", install_command("cuda"))
    return Finding(name, True, gpus)


def _missing_cuda_libraries() -> str:
    """NVIDIA's libraries that the CUDA provider cannot load; empty if all load."""
    from glm4_runtime.errors import UnavailableError
    from glm4_runtime.session.ort import load_onnxruntime
    from glm4_runtime.session.ort_cuda import preload_cuda

    try:
        return preload_cuda(load_onnxruntime())
    except UnavailableError as error:
        return str(error)


def _gpus() -> str:
    return "; ".join(_asked_of_gpus("name,memory.total"))


def _asked_of_gpus(fields: str) -> list[str]:
    """One line per GPU from nvidia-smi; empty if it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):  # a driver that hangs or is broken counts as none
        return []
    return found.stdout.strip().splitlines() if found.returncode == 0 else []


def _serving() -> Finding:
    name = "run: serving image"
    missing = _missing("fastapi", "uvicorn", "llguidance", "prometheus_client")
    if missing:
        return Finding(name, False, f"{', '.join(missing)} not installed", install_command("serve"))
    # A serving image holds neither; that the runtime imports neither is held by a test.
    present = [name for name in ("torch", "onnx") if not _missing(name)]
    detail = (
        f"{', '.join(present)} installed, which serving does not need"
        if present
        else "no torch, no onnx needed"
    )
    return Finding(name, True, detail)


def _tensorrt_rtx() -> Finding:
    name = "export: target tensorrt-rtx"
    missing = _missing("tensorrt_rtx", "polygraphy")
    if missing:
        return Finding(
            name,
            False,
            f"{', '.join(missing)} not installed",
            install_command("cpu", "export", "tensorrt-rtx"),
        )
    return Finding(name, True, f"tensorrt-rtx {_version('tensorrt-rtx')}; needs no GPU")


def _tensorrt() -> Finding:
    name = "export: target tensorrt"
    missing = _missing("tensorrt", "polygraphy", "triton")
    if missing:
        return Finding(name, False, f"{', '.join(missing)} not installed", _full_tensorrt())
    if not _gpus():
        return Finding(name, False, "no NVIDIA GPU or driver found (nvidia-smi)", "run on a GPU host")
    return Finding(name, True, f"tensorrt {_version('tensorrt')} on {_gpus()}")


def _engines() -> Finding:
    name = "run: TensorRT engines"
    installed = [p for p in ("tensorrt-rtx", "tensorrt") if _version(p)]
    if not installed or _missing("cuda"):
        return Finding(
            name,
            False,
            "a TensorRT or cuda-bindings is not installed",
            install_command("tensorrt-rtx"),
        )
    gpus = _gpus()
    if not gpus:
        return Finding(name, False, "no NVIDIA GPU or driver found (nvidia-smi)", "run on a GPU host")
    from glm4_exporters.engine.kinds import ENGINE_KINDS

    named = ENGINE_KINDS["tensorrt-rtx"].capabilities
    unnamed = [cc for cc in _asked_of_gpus("compute_cap") if cc.replace(".", "") not in named]
    if installed == ["tensorrt-rtx"] and unnamed:
        detail = f"{gpus}: tensorrt-rtx has no kernels for compute capability {unnamed[0]}"
        return Finding(
            name, False, detail, f"{_full_tensorrt()}, or export with --target ort --precision fp16"
        )
    return Finding(name, True, f"{', '.join(installed)} on {gpus}")


def _full_tensorrt() -> str:
    command = install_command("export", "tensorrt")
    return f"on a GPU host: {command} with NVIDIA's package index as --extra-index-url"


CHECKS = (_export, _onnxruntime, _cpu_operators, _cuda, _serving, _tensorrt_rtx, _tensorrt, _engines)
