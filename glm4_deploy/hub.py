"""Checkpoints, adapters and bundles by their names on a model hub, such as ``THUDM/GLM-4-9B-0414``.

huggingface_hub downloads: its cache, its resumed downloads, its access token and its environment variables
(``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``) work as usual.
"""

import glob
import io
import json
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glm4_runtime.bundle import MANIFEST, read_manifest
from glm4_runtime.bundle.file_names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    GGUF,
    INDEX,
    PICKLES,
    QUANTIZATION_CONFIGS,
    SAFETENSORS,
    SIDE_FILES,
)
from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.errors import BundleError, CheckpointError, Glm4Error, shown
from glm4_runtime.install import install_command
from glm4_runtime.progress import Progress, silent

# Small files that may be needed. These lists never contain pickles.
SMALL_FILES = (CONFIG, INDEX, ADAPTER_CONFIG, *QUANTIZATION_CONFIGS, *SIDE_FILES)
_SHARD = r"[\w.-]+\.safetensors"
# The form of a name on a hub: owner and repository.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def is_hub_name(path: str | Path) -> bool:
    """Whether ``path`` names a repository on the hub. An existing folder or file of that name has priority."""
    return _NAME.fullmatch(str(path)) is not None and not Path(path).exists()


def local_folder(path: str | Path, revision: str | None = None, progress: Progress = silent) -> Path:
    """``path`` if it is a folder, or the downloaded folder if ``path`` is a name on the hub.

    Raises:
        CheckpointError: the name is not on the hub, the hub cannot be reached, or it holds no safetensors.
    """
    if is_hub_name(path):
        return download(Path(path).as_posix(), revision, progress)
    if revision is not None:
        raise CheckpointError(
            f"--revision is for a name on the hub; {path} is not one, or a folder has that name"
        )
    return Path(path)


def download(name: str, revision: str | None = None, progress: Progress = silent) -> Path:
    """Download a checkpoint or an adapter, or reuse an earlier download; returns its folder.

    Args:
        revision: a branch, a tag or a commit; the main branch by default.
    """
    folder = _fetch(name, revision, SMALL_FILES, silent)
    commit = folder.name
    wanted = _weight_files(folder)
    _fetch(name, commit, wanted, progress)
    if not any((folder / file).is_file() for file in wanted):
        raise CheckpointError(_without_weights(name, commit))
    return folder


def local_bundle(path: str | Path, revision: str | None = None, progress: Progress = silent) -> Path:
    """``path`` if it is a folder, or the downloaded bundle if ``path`` is a name on the hub.

    Raises:
        CheckpointError: the name is not on the hub, or the hub cannot be reached.
        BundleError: the repository holds no bundle, or one that lacks a file of its manifest.
    """
    if not is_hub_name(path):
        return local_folder(path, revision)
    name = Path(path).as_posix()
    folder = _fetch(name, revision, [MANIFEST], silent)
    if not (folder / MANIFEST).is_file():
        raise BundleError(
            f"{name} on the hub holds no {MANIFEST}, so it is no bundle; make one with: glm4-deploy export {name} BUNDLE"
        )
    _fetch(name, folder.name, read_manifest(folder).files, progress)
    return folder


@contextmanager
def headers_only(name: str, revision: str | None = None) -> Iterator[Path]:
    """A folder like :func:`download`'s, with the headers of the weights only; the data are holes in the files."""
    folder = _fetch(name, revision, SMALL_FILES, silent)
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / Path(name).name
        made.mkdir()
        for file in folder.iterdir():
            if file.is_file() and file.name in SMALL_FILES:
                (made / file.name).write_bytes(file.read_bytes())
        for file_name in _weight_files(folder):
            header = _header(name, folder.name, file_name)
            if header is not None:
                _write_hollow(made / file_name, header)
        if not any(made.glob("*.safetensors")):
            raise CheckpointError(_without_weights(name, folder.name))
        yield made


def _weight_files(folder: Path) -> list[str]:
    """The names of the weight files, from the index if there is one."""
    if not (folder / INDEX).is_file():
        return [ADAPTER_WEIGHTS] if (folder / ADAPTER_CONFIG).is_file() else [SAFETENSORS]
    weight_map = read_object(folder / INDEX, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX} is not an index of safetensors files")
    files = weight_map.values()
    wrong = [file for file in files if not (isinstance(file, str) and re.fullmatch(_SHARD, file))]
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX} names {shown(wrong[0])}, which is not a safetensors file beside it"
        )
    return sorted(set(files))


def _fetch(name: str, revision: str | None, files: Iterable[str], progress: Progress) -> Path:
    """Download ``files``, except for files that the repository lacks. Returns the snapshot's folder."""
    hub = _library()
    patterns = [glob.escape(file) for file in files]
    with _told(name, revision):
        return Path(
            hub.snapshot_download(
                name, revision=revision, allow_patterns=patterns, tqdm_class=_bars(progress)
            )
        )


def _header(name: str, commit: str, file: str) -> dict[str, Any] | None:
    """The header of a safetensors file, without its data; None if there is no such file."""
    hub = _library()
    from huggingface_hub.errors import EntryNotFoundError

    with _told(name, commit):
        try:
            found = hub.HfApi().parse_safetensors_file_metadata(name, file, revision=commit)
        except EntryNotFoundError:
            return None
    return {
        key: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for key, tensor in found.tensors.items()
    }


def _write_hollow(path: Path, header: dict[str, Any]) -> None:
    """Write a safetensors file whose data is a hole: it takes no room on the disk."""
    text = json.dumps(header).encode()
    data = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + data)


def _without_weights(name: str, commit: str) -> str:
    hub = _library()
    with _told(name, commit):
        files = hub.HfApi().list_repo_files(name, revision=commit)
    pickles = [file for file in files if file.endswith(PICKLES)]
    ggufs = [file for file in files if file.endswith(GGUF)]
    if pickles:
        return f"{name} holds pickles ({pickles[0][:80]}) and no safetensors; pickles can run code and are not loaded: save it as safetensors"
    if ggufs:
        return f"{name} holds GGUF files ({ggufs[0][:80]}); name the original checkpoint in safetensors"
    return f"{name} holds no {SAFETENSORS} and no {INDEX}; name a checkpoint in safetensors"


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """Turn each error of the library into a one-line error."""
    from huggingface_hub import errors

    at = f"{name} at revision {revision}" if revision else name
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name} is gated: accept its terms on its page, then set HF_TOKEN or run 'hf auth login'"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder {name} here and no {name} on the hub, or it is private; "
            "check the name, or set HF_TOKEN or run 'hf auth login'"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{name} has no revision {revision!r}; name a branch, a tag or a commit of it"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"the hub cannot be reached, and {at} is not whole in the local cache; go online and repeat the command"
        ) from None
    except Exception as error:  # includes errors of its HTTP client, which differs between versions
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{at} could not be downloaded: {reason[:200]}; repeat the command, and the download goes on"
        ) from error


def _bars(progress: Progress) -> type:
    """A replacement for tqdm's bars that reports bytes to ``progress``."""
    from tqdm.std import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"file": io.StringIO()})

        def display(self, **_where: Any) -> None:
            if self.unit == "B" and self.n:
                progress("download", int(self.n), int(self.total or 0))

    return Bar


def _library() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise Glm4Error(
            f"names on the hub need huggingface_hub; run {install_command('hub')}, or name a folder"
        ) from error
    return huggingface_hub
