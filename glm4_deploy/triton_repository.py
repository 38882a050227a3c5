"""Writes a model repository for NVIDIA's Triton Inference Server around a bundle."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from glm4_runtime.bundle import Manifest, read_manifest
from glm4_runtime.bundle.file_names import CONFIG, MANIFEST
from glm4_runtime.errors import ExportError
from glm4_runtime.session import limits_of
from glm4_runtime.triton_server import BUNDLE

NO_PARAMETERS: Mapping[str, str] = MappingProxyType({})
MODEL = '''"""The model is in the package glm4-deploy, which Triton's Python environment needs."""

from glm4_runtime.triton_server.model import TritonPythonModel as TritonPythonModel
'''


@dataclass(frozen=True)
class Tensor:
    """A tensor of ``config.pbtxt``; -1 in ``dims`` stands for any size."""

    name: str
    type: str
    dims: tuple[int, ...]
    optional: bool = False


STRING, ONE = "TYPE_STRING", (1,)
GENERATING_INPUTS = (
    Tensor("text_input", STRING, ONE, optional=True),
    Tensor("messages", STRING, ONE, optional=True),
    Tensor("stream", "TYPE_BOOL", ONE, optional=True),
    Tensor("sampling_parameters", STRING, ONE, optional=True),
    Tensor("exclude_input_in_output", "TYPE_BOOL", ONE, optional=True),
)
GENERATING_OUTPUTS = (
    Tensor("text_output", STRING, ONE),
    Tensor("finish_reason", STRING, ONE),
    Tensor("num_input_tokens", "TYPE_UINT32", ONE),
    Tensor("num_output_tokens", "TYPE_UINT32", ONE),
)
TEXTS = (Tensor("text_input", STRING, (-1,)),)
# Inputs and outputs of each task.
TENSORS: Mapping[str, tuple[Sequence[Tensor], Sequence[Tensor]]] = {
    "causal-lm": (GENERATING_INPUTS, GENERATING_OUTPUTS),
    "sequence-classification": (TEXTS, (Tensor("logits", "TYPE_FP32", (-1, -1)),)),
    "token-classification": (TEXTS, (Tensor("logits", "TYPE_FP32", (-1, -1)),)),
    "encoder": (TEXTS, (Tensor("embedding", "TYPE_FP32", (-1, -1)),)),
}


def write_repository(
    bundle: Path, repository: Path, name: str | None = None, parameters: Mapping[str, str] = NO_PARAMETERS
) -> Path:
    """Write ``repository/name`` with ``config.pbtxt``, ``1/model.py`` and the bundle, and return this folder.

    The bundle's files are hard links where the file system allows them, and copies elsewhere.

    Args:
        name: of the model in Triton; the bundle's by default.
        parameters: for the session, by name: see ``glm4_runtime.triton_server.model.PARAMETERS``.

    Raises:
        BundleError: ``bundle`` is none, or allows less than the parameters ask for.
        ExportError: the folder exists, or the name cannot be a folder's.
    """
    manifest, name = read_manifest(bundle), name or bundle.resolve().name
    limits_of(manifest, *(_number(parameters, key) for key in ("max_seq_len", "max_batch_size")))
    if Path(name).name != name or name.startswith("."):
        raise ExportError(f"{name!r} cannot be the name of a model; give one without slashes by --name")
    folder = repository / name
    if "max_queue" in parameters and manifest.task != "causal-lm":
        raise ExportError(f"a model for {manifest.task} has no queue; leave out --max-queue")
    _require_apart(repository, bundle)
    if folder.exists():
        raise ExportError(f"{folder} exists; remove it, or give another name by --name")
    repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=repository) as staging:
        made = Path(staging) / name
        (made / "1").mkdir(parents=True)
        shutil.copytree(bundle, made / "1" / BUNDLE, copy_function=_link_or_copy)
        (made / "1" / "model.py").write_text(MODEL, "utf-8")
        (made / "config.pbtxt").write_text(config(manifest, name, parameters), "utf-8")
        made.rename(folder)
    return folder


def _require_apart(repository: Path, bundle: Path) -> None:
    """A repository is neither in the bundle that it takes, nor a bundle or a checkpoint itself."""
    inside = repository.resolve().is_relative_to(bundle.resolve())
    if inside or any((repository / name).is_file() for name in (MANIFEST, CONFIG)):
        raise ExportError(f"{repository} is a bundle or a checkpoint, or inside one; choose another place")


def config(manifest: Manifest, name: str, parameters: Mapping[str, str]) -> str:
    """The text of ``config.pbtxt``."""
    inputs, outputs = TENSORS[manifest.task]
    decoupled = "true" if manifest.task == "causal-lm" else "false"
    kind = "KIND_GPU" if manifest.may_use_gpu else "KIND_CPU"
    blocks = [
        f"name: {_quoted(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        f"model_transaction_policy {{ decoupled: {decoupled} }}",
        *(_tensor("input", each) for each in inputs),
        *(_tensor("output", each) for each in outputs),
        f"instance_group [ {{ count: 1 kind: {kind} }} ]",
        *(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(blocks) + "\n"


def _number(parameters: Mapping[str, str], key: str) -> int | None:
    return int(parameters[key]) if key in parameters else None


def _tensor(kind: str, tensor: Tensor) -> str:
    optional = " optional: true" if tensor.optional else ""
    dims = ", ".join(map(str, tensor.dims))
    return f"{kind} {{ name: {_quoted(tensor.name)} data_type: {tensor.type} dims: [ {dims} ]{optional} }}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
