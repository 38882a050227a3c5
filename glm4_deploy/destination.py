"""The place of a bundle: checks before an export, the hidden folder for writing, and the step that publishes.

    .NAME.RANDOM.partial/    beside the bundle's place, while an export runs
        lock                 locked while the export runs. The system frees the lock even after a kill
        bundle/              the new bundle; after the exchange with the old bundle, the old bundle
        replaced/            the old bundle, between two renames, if folders cannot be exchanged

A killed export leaves this folder. The next export to the same place removes it. Locks work between all processes on a
file system, also in other containers. On NFS, locks work between hosts, unless the mount has the option ``nolock`` or
``local_lock``. With such a mount, two hosts must not export to one place at the same time.
"""

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from glm4_deploy import interrupts
from glm4_deploy.locks import lock
from glm4_deploy.own_text import OWN_TEXT
from glm4_runtime.bundle import MANIFEST, REPORT
from glm4_runtime.bundle.file_names import LONGEST_FILE_NAME, SIDE_FILES
from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.errors import ExportError

LOCK, NEW, REPLACED = "lock", "bundle", "replaced"
WRITTEN = (".onnx", ".onnx.data", ".engine")  # ends of the names of graphs, weights and engines
MOUNTS = Path("/proc/self/mountinfo")
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


class Destination:
    """The place of one bundle.

    Attributes:
        bundle: the path as the user named it, for messages.
        place: the same path without ``..`` and links, so that no rename changes its meaning.
        force: whether to replace an existing bundle.
    """

    def __init__(self, bundle: Path, force: bool) -> None:
        self.bundle, self.force = bundle, force
        plain = bundle.name not in ("", "..")
        real = Path(os.path.realpath(bundle.parent if plain else bundle))
        self.place = real / bundle.name if plain else real

    def recover(self) -> None:
        """Clean up after killed exports to this place, and restore a bundle that they had moved aside."""
        pattern = re.compile(rf"\.{re.escape(self.place.name)}\.[0-9a-f]{{16}}\.partial")
        with suppress(OSError):  # no such folder, or not readable
            for work in [*self.place.parent.iterdir()]:
                if pattern.fullmatch(work.name):
                    self._recover(work)

    def check(self, checkpoint: Path) -> None:
        """Refuse a place where the bundle cannot be published, before the work.

        Raises:
            ExportError: something there may not be replaced, or the place is not writable.
        """
        self._require_name()
        self._require_apart(checkpoint)
        if self.bundle.is_symlink() or (self.place.exists() and not self.place.is_dir()):
            raise ExportError(f"{self.bundle} exists and is not a folder; choose another name")
        self._require_movable()
        if self._occupied():
            self._require_replaceable()
        self._require_writable()

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A new folder for the bundle, removed at the end of the block unless it was published.

        Raises:
            ExportError: for any OSError in the block, such as a full disk.
        """
        parent = self.place.parent
        made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        with interrupts.held():
            try:
                parent.mkdir(parents=True, exist_ok=True)
                with self._working_folder() as work:
                    (work / NEW).mkdir()
                    with interrupts.held(False):
                        yield work / NEW
            except OSError as error:
                raise ExportError(
                    f"the bundle could not be written to {parent}: {error.strerror or error}"
                ) from error
            finally:
                for folder in made:
                    with suppress(OSError):  # not empty: the bundle exists
                        folder.rmdir()

    def publish(self, folder: Path) -> None:
        """Move a complete bundle from the folder of :meth:`staged` to its place.

        Raises:
            ExportError: something that may not be replaced appeared there during the export.
        """
        if not self._occupied():
            with suppress(FileNotFoundError):
                self.place.rmdir()  # an empty one, onto which Windows renames nothing
            folder.rename(self.place)
            return
        self._require_replaceable()
        if not _exchange(folder, self.place):
            # If the process ends between the two renames, `_recover` restores the old bundle.
            self.place.rename(folder.with_name(REPLACED))
            folder.rename(self.place)

    # Checks of the place ----------------------------------------------------------------------------

    def _occupied(self) -> bool:
        return self.place.is_dir() and any(self.place.iterdir())

    def _require_name(self) -> None:
        if (
            max(len(os.fsencode(name)) for name in (*self.place.parts, self._working_name()))
            > LONGEST_FILE_NAME
        ):
            raise ExportError(f"the name {self.place.name[:40]}... is too long; choose a shorter one")
        try:
            str(self.place).encode()
        except UnicodeEncodeError:
            raise ExportError(
                f"the path {str(self.place)!r} is not UTF-8 text, as the graph's tools need it; choose another name"
            ) from None

    def _require_apart(self, checkpoint: Path) -> None:
        if not checkpoint.exists():  # a name on the hub
            return
        source = Path(os.path.realpath(checkpoint))
        if self.place == source:
            raise ExportError(f"{self.bundle} is the checkpoint itself; choose another place")
        if source in self.place.parents:
            raise ExportError(
                f"{self.bundle} is inside the checkpoint {checkpoint}; choose a place outside it"
            )

    def _require_movable(self) -> None:
        """Publishing renames a folder. Refuse mount points, which cannot be renamed, and the current folder."""
        if any(self.place in (mount, *mount.parents) for mount in _mounts(self.place)):
            raise ExportError(
                f"{self.bundle} is or holds a mount point, which no bundle can replace; "
                f"name a new folder in it, as {self.bundle / 'bundle'}"
            )
        with suppress(OSError):  # the current folder no longer exists
            here = Path(os.path.realpath(Path.cwd()))
            if self.place in (here, *here.parents):
                raise ExportError(
                    f"{self.bundle} is the current folder or above it; go to another folder, or choose another place"
                )

    def _require_replaceable(self) -> None:
        names = _files_of_ours(self.place)
        if names is None:
            raise ExportError(
                f"{self.bundle} exists and is not a bundle, so it is not replaced; choose another name"
            )
        if not self.force:
            raise ExportError(
                f"{self.bundle} is a bundle already; replace it with --force, or choose another name"
            )
        for path in sorted(self.place.iterdir()):
            if path.name not in names or (path.is_dir() and not path.is_symlink()):
                raise ExportError(
                    f"{self.bundle} holds {path.name!r}, which is not of the bundle and would be deleted; "
                    "move it elsewhere, or choose another name"
                )

    def _require_writable(self) -> None:
        parent = next(folder for folder in self.place.parents if folder.exists())
        if not parent.is_dir():
            raise ExportError(f"{parent} is not a folder; choose another place")
        for folder in (parent, *([self.place] if self.place.exists() else [])):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise ExportError(f"{folder} is not writable; choose another place")

    # The folder beside it -------------------------------------------------------------------------

    def _working_name(self) -> str:
        return f".{self.place.name}.{os.urandom(8).hex()}.partial"

    @contextmanager
    def _working_folder(self) -> Iterator[Path]:
        work, held = self._claim()
        try:
            yield work
        finally:
            self._end(work, held)

    def _claim(self) -> tuple[Path, int | None]:
        """A new working folder and its lock; the lock is None if the file system has no locks."""
        while True:
            work = self.place.with_name(self._working_name())
            work.mkdir()
            try:
                return work, lock(work / LOCK)
            except (BlockingIOError, FileNotFoundError):
                continue  # another export removed the folder as the remains of a killed one
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    self._end(work, None)
                    raise
                return work, None

    def _recover(self, work: Path) -> None:
        """If no running export holds the folder, clean up the remains of a killed one."""
        try:
            held = lock(work / LOCK)
        except OSError:  # another export has it, or the file system has no locks
            return
        self._end(work, held)

    def _end(self, work: Path, held: int | None) -> None:
        """Empty and remove a working folder with its lock. Windows can delete the lock only after it is closed."""
        try:
            emptied = self._emptied(work)
            if held is not None and sys.platform == "win32":
                os.close(held)
                held = None
            if emptied:
                with suppress(OSError):
                    (work / LOCK).unlink(missing_ok=True)
                    work.rmdir()
        finally:
            if held is not None:
                os.close(held)

    def _emptied(self, work: Path) -> bool:
        """Restore a bundle that an export moved aside; returns whether nothing valuable is left."""
        new, replaced = work / NEW, work / REPLACED
        if replaced.exists() and new.exists():  # the export ended between the two renames
            try:
                replaced.rename(self.place)
            except OSError:  # something else is there now, so this is the only copy
                return False
        for folder in (new, replaced):
            shutil.rmtree(folder, ignore_errors=True)
        return True


def _files_of_ours(folder: Path) -> set[str] | None:
    """The file names in a bundle's manifest, of any schema version; None if it is no bundle of ours."""
    try:
        manifest = read_object(folder / MANIFEST, ExportError)
        files, tools = manifest["files"], manifest["tools"]
        ours = (
            isinstance(manifest["schema_version"], int)
            and isinstance(manifest["source_sha256"], str)
            and "glm4-deploy" in tools
            and all(entry.keys() >= {"sha256", "bytes"} for entry in files.values())
        )
    except (ExportError, LookupError, TypeError, AttributeError):
        return None
    return {MANIFEST, REPORT, *filter(_is_a_bundles, files)} if ours else None


def _is_a_bundles(name: str) -> bool:
    """Whether an export writes files of this name. A manifest may be forged, and name a user's own files."""
    return name in SIDE_FILES or name.endswith(WRITTEN) or Path(name).stem == OWN_TEXT


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False if the system cannot."""
    import ctypes  # imported here, so that --help stays quick

    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other)
    return renameat2 is not None and renameat2(*paths, RENAME_EXCHANGE) == 0


def _mounts(place: Path) -> Iterator[Path]:
    """The mount points of this machine that may concern ``place``."""
    if os.path.ismount(place):
        yield place
    with suppress(OSError):  # not Linux, or no /proc
        for line in MOUNTS.read_bytes().splitlines():
            escaped = line.split(b" ")[4]  # space, tab, newline and backslash are written as \040 and so on
            yield Path(os.fsdecode(re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), escaped)))
