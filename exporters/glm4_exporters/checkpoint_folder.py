"""The files of a checkpoint folder: which must exist, and whether an index and its files agree."""

import re
from collections import Counter
from pathlib import Path

from glm4_runtime.bundle.file_names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    GGUF,
    INDEX,
    LONGEST_FILE_NAME,
    PICKLES,
    SAFETENSORS,
)
from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.bundle.safetensors_file import SafetensorsFile
from glm4_runtime.errors import CheckpointError, shown, some

# Files that a folder without safetensors may hold instead, with advice for the error.
OTHER_WEIGHTS = {
    "model-*.safetensors": f"are shards without {INDEX}; download that file too",
    ADAPTER_WEIGHTS: "is an adapter; merge it into its base model and save that",
    **{
        f"*{end}": "is pickled, which can run code when it is read; convert it: from_pretrained(...).save_pretrained(...)"
        for end in PICKLES
    },
    f"*{GGUF}": "is a GGUF file; give the checkpoint that it was made from",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def require_folder(folder: Path) -> None:
    """Refuse, with advice, a folder that is missing or has no configuration.

    Raises:
        CheckpointError: the path is a file or missing, or the folder has no ``config.json``.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder that holds it and {CONFIG}")
    if not folder.is_dir():
        hub = HUB_ID.fullmatch(str(folder))
        advice = (
            f"; if it is a model of the Hugging Face hub, first: hf download {folder} --local-dir ..."
            if hub
            else ""
        )
        raise CheckpointError(f"there is no folder {folder}{advice}")
    if not (folder / CONFIG).is_file():
        adapter = (folder / ADAPTER_CONFIG).is_file()
        advice = (
            "it is an adapter: merge it into its base model and save that"
            if adapter
            else "give a checkpoint's folder"
        )
        raise CheckpointError(f"{folder} has no {CONFIG}; {advice}")


def open_shards(folder: Path) -> list[SafetensorsFile]:
    """Open the safetensors files of a folder: the single file, or all files that the index names. Reads headers only.

    Raises:
        CheckpointError: files are missing or damaged, or the index and the files' headers disagree.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SAFETENSORS).is_file():
            return [SafetensorsFile(folder / SAFETENSORS)]
        raise CheckpointError(_no_weights(folder))
    weight_map = _read_weight_map(index)
    names = sorted(set(weight_map.values()))
    if SAFETENSORS not in names and (folder / SAFETENSORS).is_file():
        raise CheckpointError(
            f"{folder} has both {SAFETENSORS} and {INDEX}; remove the one that is out of date"
        )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {some(absent)} of the {len(names)} files that {INDEX} names; finish the download"
        )
    shards = [SafetensorsFile(folder / name) for name in names]
    _check_index(index, weight_map, shards)
    return shards


def _no_weights(folder: Path) -> str:
    wanted = f"{folder} has neither {SAFETENSORS} nor {INDEX}"
    for pattern, advice in OTHER_WEIGHTS.items():
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            return f"{wanted}; {found[0]} {advice}"
    return f"{wanted}; finish the download"


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map that names each tensor's file; download it again")
    for name in weight_map.values():
        if not _is_plain(name):
            raise CheckpointError(f"{index} names the file {shown(name)}, but only files beside it are read")
    return weight_map


def _is_plain(name: object) -> bool:
    """Whether the name is a file name without a folder, so that the file is beside the index."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name.encode()) <= LONGEST_FILE_NAME
        and not set(name) & set("/\\\0")
    )


def _check_index(index: Path, weight_map: dict[str, str], shards: list[SafetensorsFile]) -> None:
    count = Counter(name for shard in shards for name in shard.headers)
    shard_of = {name: shard.path.name for shard in shards for name in shard.headers}
    complaints = {
        "in two files": [name for name, times in count.items() if times > 1],
        "in the index but not in its file": [
            name for name, file in weight_map.items() if count[name] < 2 and shard_of.get(name) != file
        ],
        "in a file but not in the index": [name for name in count if name not in weight_map],
    }
    found = [f"{len(names)} {what} ({some(names)})" for what, names in complaints.items() if names]
    if found:
        raise CheckpointError(
            f"{index} and its files disagree, tensors: {'; '.join(found)}; download them again"
        )
