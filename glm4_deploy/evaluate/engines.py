"""The engines to ask: bundles, servers, and a checkpoint as the reference. Each is a model of the harness."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from lm_eval.api.model import LM

from glm4_deploy import folders
from glm4_deploy.harness.model import BundleModel
from glm4_deploy.memory import available_memory
from glm4_deploy.show import readable_size
from glm4_exporters.architecture import parameter_count
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.bundle import MANIFEST, read_manifest
from glm4_runtime.errors import Glm4Error, RequestError
from glm4_runtime.install import install_command

REFERENCE = "reference"
URL = re.compile(r"https?://")
PROBE_SECONDS = 10.0
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Engine:
    """One column of the result.

    Attributes:
        label: a short name, which ``--gate`` uses.
        where: a folder or an address.
        identity: SHA-256 of what determines the answers; kept answers of another identity are not used.
        open: loads the model.
    """

    label: str
    where: str
    identity: str
    open: Callable[[], LM]


def find_engines(named: Sequence[str], reference: Path | None, chat: bool = False) -> list[Engine]:
    """The engines of a command line, the reference first.

    Args:
        named: ``PATH``, ``URL``, ``LABEL=PATH`` or ``LABEL=URL``.
        chat: whether the chat template writes the prompts. The template writes [gMASK]<sop>, too.

    Raises:
        Glm4Error: an engine is missing or is no bundle, two have one label, or a server needs a tokenizer.
    """
    found = [] if reference is None else [_of_checkpoint(reference, not chat)]
    for text in named:
        label, where = _parted(text)
        found.append(
            _of_server(label, where, reference, not chat)
            if URL.match(where)
            else _of_bundle(label, Path(where))
        )
    labels = [each.label for each in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise RequestError(f"two engines are called {twice}; name them: LABEL=BUNDLE")
    return found


def _parted(text: str) -> tuple[str, str]:
    label, sign, where = text.partition("=")
    return (label, where) if sign and label and "/" not in label else ("", text)


def _of_bundle(label: str, folder: Path) -> Engine:
    folders.require_generator(folder)
    manifest = read_manifest(folder)
    return Engine(
        label or manifest.precision,
        str(folder),
        hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
        lambda: BundleModel(str(folder)),
    )


def _of_server(label: str, url: str, reference: Path | None, prefix: bool) -> Engine:
    if reference is None:
        raise RequestError(f"{url} gives no tokenizer to the harness; add --reference CHECKPOINT")
    base = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"
    try:
        listed = httpx.get(f"{base}/models", timeout=PROBE_SECONDS, headers=_key())
        listed.raise_for_status()
        model = listed.json()["data"][0]
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise Glm4Error(
            f"{base}/models does not answer as a server of models ({error}); start the server first"
        ) from error
    arguments = {
        "base_url": f"{base}/completions",
        "model": model["id"],
        "tokenizer": str(reference),
        "tokenizer_backend": "huggingface",
        "add_bos_token": prefix,
        "num_concurrent": 4,
        **({"max_length": model["max_model_len"]} if "max_model_len" in model else {}),
    }
    identity = hashlib.sha256(f"{base} {model}".encode()).hexdigest()
    return Engine(label or model["id"], base, identity, lambda: _made("local-completions", arguments))


def _key() -> dict[str, str]:
    """The header with GLM4_API_KEY, as ``bench-serve`` sends it. The harness reads the same key from OPENAI_API_KEY."""
    key = os.environ.get("GLM4_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _of_checkpoint(folder: Path, prefix: bool) -> Engine:
    folders.require_checkpoint(folder)
    with Checkpoint.load(folder) as checkpoint:
        needed = FLOAT32 * parameter_count(checkpoint.config, checkpoint.task)
    if needed > (available := available_memory()):
        raise RequestError(
            f"{folder} takes {readable_size(needed)} in float32, and {readable_size(available)} of memory are available; "
            "leave out --reference, and name a bundle of the highest precision first"
        )
    arguments: dict[str, Any] = {"pretrained": str(folder), "dtype": "float32", "device": "cpu"}
    if (
        not prefix
    ):  # True would change the tokenizer; without the argument, the tokenizer's own prefix is used
        arguments["add_bos_token"] = False
    return Engine(REFERENCE, str(folder), _sizes(folder), lambda: _made("hf", arguments))


def _made(name: str, arguments: dict[str, Any]) -> LM:
    from lm_eval.api.registry import get_model

    try:
        return get_model(name).create_from_arg_obj(arguments, {"batch_size": 1})
    except ModuleNotFoundError as error:
        raise Glm4Error(f"{name} needs {error.name}; run {install_command('eval')}") from error


def _sizes(folder: Path) -> str:
    """SHA-256 of names, sizes and times of a checkpoint's files: its weights are too large to hash for this."""
    files = sorted(each for each in folder.iterdir() if each.is_file())
    told = [f"{each.name} {each.stat().st_size} {each.stat().st_mtime_ns}" for each in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()
