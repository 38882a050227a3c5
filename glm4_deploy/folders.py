"""Finds the kind of a path: a checkpoint, a bundle, or another kind that users confuse with these."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm4_runtime.bundle import ENGINE, GRAPH, MANIFEST, read_manifest
from glm4_runtime.bundle.file_names import ADAPTER_CONFIG, CONFIG, GGUF, PICKLES
from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.errors import BundleError, CheckpointError, Glm4Error

ANY_SAFETENSORS = "*.safetensors"
LOOKED_AT = 1000  # maximum number of entries of a folder to look at
MADE_FROM = "give the checkpoint that it was made from, in safetensors"
SAVE = "convert it: from_pretrained(...).save_pretrained(...)"


@dataclass(frozen=True)
class Kind:
    """A row of the table: the name of the kind, and advice for a command that needs a checkpoint."""

    what: str
    advice: str


# {path} is the path, {inner} a folder or file found inside.
FOLDER_KINDS = {
    "checkpoint": Kind("a checkpoint", ""),
    "quantized": Kind("a checkpoint that {inner} quantized", ""),
    "bundle": Kind("a bundle", "give the checkpoint that it was made from"),
    "engine": Kind("a bundle with a TensorRT engine", "give the checkpoint that it was made from"),
    "adapter": Kind("an adapter", "export its base model{inner} with --lora {path}"),
    "gguf": Kind("GGUF ({inner})", MADE_FROM),
    "pickles": Kind("pickled ({inner}), which can run code when it is read", SAVE),
    "graph": Kind("an ONNX graph of another tool ({inner})", MADE_FROM),
    "weights file": Kind("a file of a checkpoint", "give its folder, {inner}"),
    "bundle file": Kind("a file of a bundle", "give its folder, {inner}"),
    "file": Kind("a file", "give the folder that holds it and " + CONFIG),
    "cached": Kind("a folder of a hub's cache", "give the checkpoint in it, {inner}"),
    "cache": Kind("a hub's cache", "give a checkpoint in it, as {inner}/snapshots/COMMIT"),
    "around": Kind("a folder around others", "give the one in it, {inner}"),
    "other": Kind(f"neither a bundle (no {MANIFEST}) nor a checkpoint (no {CONFIG})", "give a checkpoint's folder"),
}  # fmt: skip
CHECKPOINTS, BUNDLES = ("checkpoint", "quantized"), ("bundle", "engine")


def kind_of(path: Path) -> tuple[str, str]:
    """The name of a row of FOLDER_KINDS, and the folder or file found inside. "nothing" if the path does not exist."""
    try:
        if path.is_file():
            return _kind_of_file(path)
        if not path.is_dir():
            return "nothing", ""
        return _kind_of_folder(path) or ("other", "")
    except OSError:  # the name is too long, or the folder not readable
        return "nothing", ""


def is_checkpoint(path: Path) -> bool:
    return kind_of(path)[0] in CHECKPOINTS


def require_checkpoint(path: Path) -> None:
    """Refuse a path that is no checkpoint, and name its kind. Names on the hub are not checked here.

    Raises:
        CheckpointError: with advice.
    """
    kind, inner = kind_of(path)
    if kind in (*CHECKPOINTS, "nothing"):
        return
    raise CheckpointError(_sentence(path, kind, inner, "a checkpoint", FOLDER_KINDS[kind].advice))


def require_bundle(path: Path) -> None:
    """Refuse a path that is no bundle, and name its kind.

    Raises:
        BundleError: with advice.
    """
    kind, inner = kind_of(path)
    if kind in BUNDLES:
        return
    if kind == "nothing":
        raise BundleError(
            f"{path} is not a bundle (no such folder); make one with: glm4-deploy export CHECKPOINT BUNDLE"
        )
    advice = FOLDER_KINDS[kind].advice
    if kind in CHECKPOINTS:
        advice = f"make a bundle of it: glm4-deploy export {path} BUNDLE"
    elif kind in ("gguf", "pickles", "graph"):
        advice += ", and make a bundle of that: glm4-deploy export CHECKPOINT BUNDLE"
    elif kind in ("file", "other"):
        advice = "give a bundle's folder, as glm4-deploy export makes it"
    raise BundleError(_sentence(path, kind, inner, "a bundle", advice))


def require_generator(path: Path) -> None:
    """As :func:`require_bundle`, for a model that generates text."""
    require_bundle(path)
    task = read_manifest(path).task
    if task != "causal-lm":
        raise BundleError(
            f"{path} is for {task} and writes no text; use it in Python (glm4_runtime.Session) or with glm4-deploy serve"
        )


def require_either(path: Path) -> str:
    """The kind of a checkpoint or a bundle. Refuse a path that is neither."""
    kind, inner = kind_of(path)
    if kind in (*CHECKPOINTS, *BUNDLES, "nothing"):
        return kind
    raise Glm4Error(_sentence(path, kind, inner, "a checkpoint or a bundle", FOLDER_KINDS[kind].advice))


def _sentence(path: Path, kind: str, inner: str, wanted: str, advice: str) -> str:
    missing = "" if kind in ("other", "file") else f", not {wanted}"
    return f"{path} is {FOLDER_KINDS[kind].what}{missing}; {advice}".replace("{inner}", inner).replace(
        "{path}", str(path)
    )


def _kind_of_file(path: Path) -> tuple[str, str]:
    folder = path.absolute().parent
    if (folder / MANIFEST).is_file() and not (folder / CONFIG).is_file():
        return "bundle file", str(folder)
    if path.suffix == ".safetensors" and (folder / CONFIG).is_file():
        return "weights file", str(folder)
    return _by_suffix(path.name) or ("file", "")


def _by_suffix(name: str) -> tuple[str, str] | None:
    for kind, suffixes in (("gguf", (GGUF,)), ("pickles", PICKLES), ("graph", (".onnx",))):
        if name.lower().endswith(suffixes):
            return kind, name
    return None


def _kind_of_folder(folder: Path) -> tuple[str, str] | None:
    if (folder / CONFIG).is_file():
        return _kind_of_checkpoint(folder)
    if (folder / MANIFEST).is_file():
        return ("bundle" if (folder / GRAPH).is_file() or not _has_engine(folder) else "engine"), ""
    if (folder / ADAPTER_CONFIG).is_file():
        base = _read(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        return "adapter", f" {base[:100]}" if isinstance(base, str) and base else ""
    names = sorted(entry.name for entry, _ in zip(folder.iterdir(), range(LOOKED_AT), strict=False))
    found = next((kind for name in names if (kind := _by_suffix(name))), None)
    return found or _around(folder, names)


def _kind_of_checkpoint(folder: Path) -> tuple[str, str]:
    method = _read(folder / CONFIG).get("quantization_config")
    if isinstance(method, dict):
        return "quantized", str(method.get("quant_method") or "another tool")[:40]
    if not any(folder.glob(ANY_SAFETENSORS)):
        foreign = next((kind for path in sorted(folder.iterdir()) if (kind := _by_suffix(path.name))), None)
        if foreign is not None:
            return foreign
    return "checkpoint", ""


def _around(folder: Path, names: list[str]) -> tuple[str, str] | None:
    """Recognises a hub's cache, one repository in it, or a folder with a single subfolder that is the real one."""
    snapshots = [path for path in sorted(folder.glob("snapshots/*")) if (path / CONFIG).is_file()]
    if snapshots:
        return "cached", str(snapshots[-1])
    cached = [name for name in names if name.startswith("models--")]
    if cached:
        return "cache", str(folder / cached[0])
    inside = [folder / name for name in names if (folder / name).is_dir()]
    meant = [path for path in inside if (path / CONFIG).is_file() or (path / MANIFEST).is_file()]
    return ("around", str(meant[0])) if len(meant) == 1 else None


def _has_engine(folder: Path) -> bool:
    return (folder / ENGINE).is_file() or any(folder.glob("*.engine"))


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one if it is damaged; the later opening reports the damage."""
    try:
        return read_object(path, Glm4Error)
    except Glm4Error:
        return {}
