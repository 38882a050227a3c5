"""Checks the files of a bundle against their sizes and hashes in the manifest.

Every opening of a bundle hashes its small files completely, and 64 blocks of 1 MiB of a large file. In a tenth of a
second this detects an incomplete download, a file of another model, or an edited folder. ``--verify`` hashes
everything, and detects a single changed byte.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path

from glm4_runtime.bundle.file_names import SIDE_FILES
from glm4_runtime.bundle.manifest import FileEntry, Manifest
from glm4_runtime.errors import BundleError, some

SAMPLE_BLOCK, SAMPLE_BLOCKS = 1 << 20, 64
SMALL_FILE = (
    SAMPLE_BLOCK * SAMPLE_BLOCKS
)  # bytes; a file up to this size is hashed completely at every opening


def file_entry(path: Path) -> FileEntry:
    """SHA-256, size and sample of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(digest, path.stat().st_size, sample_of(path))


def sample_of(path: Path) -> str | None:
    """SHA-256 of 64 blocks of 1 MiB, evenly spread over the file, including the first and the last.

    None for a file of at most 64 MiB, which is hashed completely.
    """
    size = path.stat().st_size
    if size <= SMALL_FILE:
        return None
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for i in range(SAMPLE_BLOCKS):
            file.seek(i * (size - SAMPLE_BLOCK) // (SAMPLE_BLOCKS - 1))
            digest.update(file.read(SAMPLE_BLOCK))
    return digest.hexdigest()


def checked_at_opening(manifest: Manifest) -> dict[str, str]:
    """The check of each file at every opening: ``all``, ``sample`` or ``size``."""
    return {
        name: "all" if entry.bytes <= SMALL_FILE else "size" if entry.sample is None else "sample"
        for name, entry in manifest.files.items()
    }


def verify_files(
    folder: str | Path, manifest: Manifest, *, hashes: bool = False, names: Collection[str] | None = None
) -> None:
    """Check the folder against its manifest: every file exists, with the right size, and with its SHA-256 or sample.

    A tokenizer, template or generation config that is not in the manifest is refused.

    Args:
        hashes: hash every file completely. Otherwise a file above 64 MiB is checked by its sample.
        names: the files to check. None: all.

    Raises:
        BundleError: naming the files that are missing or differ.
    """
    unknown = [n for n in SIDE_FILES if n not in manifest.files and (Path(folder) / n).exists()]
    wrong = [f"{name} is not of this bundle" for name in unknown]
    for name, entry in sorted(manifest.files.items()):
        if names is not None and name not in names:
            continue
        try:
            complaint = _complaint(Path(folder) / name, entry, hashes)
        except OSError as error:
            complaint = f"cannot be read: {error.strerror}"
        if complaint is not None:
            wrong.append(f"{name} {complaint}")
    if wrong:
        raise BundleError(
            f"bundle {folder} is damaged: {some(wrong, '; ')}. Copy it again or export it again"
        )


def _complaint(path: Path, entry: FileEntry, hashes: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != entry.bytes:
        return f"has {size} bytes, not {entry.bytes}"
    if hashes or size <= SMALL_FILE:
        same = file_entry(path).sha256 == entry.sha256
    else:
        same = entry.sample in (None, sample_of(path))
    return None if same else "has another SHA-256 than when it was exported"
