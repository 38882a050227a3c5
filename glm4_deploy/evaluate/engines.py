"""The engines to ask: bundles, servers, and a checkpoint as the reference. Each is a model of the harness."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from lm_eval.api.model import LM

from glm4_deploy import folders
from glm4_deploy.evaluate.server_engine import PROBE_SECONDS, key_header, open_server, server_logprobs
from glm4_deploy.harness.model import BundleModel
from glm4_deploy.memory import available_memory
from glm4_deploy.metrics import Vector
from glm4_deploy.show import readable_size
from glm4_exporters.architecture import parameter_count
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.bundle import MANIFEST, read_manifest
from glm4_runtime.errors import Glm4Error, RequestError
from glm4_runtime.install import install_command

REFERENCE = "reference"
USUAL_ROOM = 2048  # tokens; of a server that does not say how many, as the harness assumes
URL = re.compile(r"https?://")
FLOAT32 = 4  # bytes
TOKENS_AT_ONCE = 256  # of a text that the checkpoint reads


@dataclass(frozen=True)
class Engine:
    """One column of the result.

    Attributes:
        label: a short name, which ``--gate`` uses.
        where: a folder or an address.
        identity: SHA-256 of what determines the answers; kept answers of another identity are not used.
        room: tokens of a prompt and its answer at most.
        open: loads the model.
        token_logprobs: of an opened model, gives the log-probability of each token after the first, in nats.
    """

    label: str
    where: str
    identity: str
    room: int
    open: Callable[[], LM]
    token_logprobs: Callable[[LM, Sequence[int]], Vector]

    @property
    def is_folder(self) -> bool:
        return not URL.match(self.where)


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
        manifest.limits.max_seq_len,
        lambda: BundleModel(str(folder)),
        BundleModel.token_logprobs,
    )


def _of_server(label: str, url: str, reference: Path | None, prefix: bool) -> Engine:
    base = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"
    try:
        listed = httpx.get(f"{base}/models", timeout=PROBE_SECONDS, headers=key_header())
        listed.raise_for_status()
        model = listed.json()["data"][0]
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise Glm4Error(
            f"{base}/models does not answer as a server of models ({error}); start the server first"
        ) from error
    arguments = {
        "base_url": f"{base}/completions",
        "model": model["id"],
        "add_bos_token": prefix,
        "num_concurrent": 4,
        "max_length": model.get("max_model_len", USUAL_ROOM),
        **({} if reference is None else {"tokenizer": str(reference)}),
    }
    identity = hashlib.sha256(f"{base} {model}".encode()).hexdigest()
    return Engine(
        label or model["id"],
        base,
        identity,
        arguments["max_length"],
        lambda: _made(lambda: open_server(arguments)),
        server_logprobs,
    )


def _of_checkpoint(folder: Path, prefix: bool) -> Engine:
    folders.require_checkpoint(folder)
    with Checkpoint.load(folder) as checkpoint:
        needed = FLOAT32 * parameter_count(checkpoint.config, checkpoint.task)
        room = checkpoint.config.positions
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
    return Engine(
        REFERENCE,
        str(folder),
        _sizes(folder),
        room,
        lambda: _made(lambda: _open_checkpoint(arguments)),
        _checkpoint_logprobs,
    )


def _made(open_model: Callable[[], LM]) -> LM:
    try:
        return open_model()
    except ModuleNotFoundError as error:
        raise Glm4Error(f"an engine needs {error.name}; run {install_command('eval')}") from error


def _open_checkpoint(arguments: dict[str, Any]) -> LM:
    from lm_eval.models.huggingface import HFLM

    return HFLM(batch_size=1, **arguments)


def _checkpoint_logprobs(model: LM, ids: Sequence[int]) -> Vector:
    """Log-probability of each token after the first, in nats, float64 [len(ids) - 1], a part of the text at a time."""
    import torch

    found, cache = [], None
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, TOKENS_AT_ONCE):
            part = ids[start : min(start + TOKENS_AT_ONCE, len(ids) - 1)]
            output = model.model(torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            targets = torch.tensor(ids[start + 1 : start + 1 + len(part)])
            logs = output.logits[0].double().log_softmax(-1)
            found.append(logs.gather(-1, targets[:, None])[:, 0].numpy())
    return np.concatenate(found)


def _sizes(folder: Path) -> str:
    """SHA-256 of names, sizes and times of a checkpoint's files: its weights are too large to hash for this."""
    files = sorted(each for each in folder.iterdir() if each.is_file())
    told = [f"{each.name} {each.stat().st_size} {each.stat().st_mtime_ns}" for each in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()
