"""Where a bundle appears: what may be replaced, the folder it is written in, and the step that publishes it.

    .NAME.RANDOM.partial/    beside the bundle's place, while an export runs
        lock                 locked; the system frees the lock however the export ends, and a kill leaves the folder
        bundle/              the new bundle; after an exchange of the two, the old one
        replaced/            the old bundle, between two renames, where folders cannot be exchanged

The next export to the same place removes what a kill left. Locks are seen by every process on a file system, in other containers too. NFS hands them on between hosts,
unless it is mounted with ``nolock`` or ``local_lock``: there, hosts must not export to one place at a time.
"""

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from glm4_deploy import interrupts
from glm4_deploy.locks import lock
from glm4_runtime.bundle import MANIFEST, REPORT
from glm4_runtime.errors import ExportError

LOCK, NEW, REPLACED = "lock", "bundle", "replaced"
LONGEST_NAME = 255  # bytes, on every usual file system
MOUNTS = Path("/proc/self/mountinfo")
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


class Destination:
    """The place of one bundle.

    Attributes:
        bundle: the path as the user named it, for messages.
        place: the same without ``..`` and links, so that no rename on the way changes its meaning.
        force: a bundle that is there already is replaced.
    """

    def __init__(self, bundle: Path, force: bool) -> None:
        self.bundle, self.force = bundle, force
        plain = bundle.name not in ("", "..")
        real = Path(os.path.realpath(bundle.parent if plain else bundle))
        self.place = real / bundle.name if plain else real

    def recover(self) -> None:
        """Clean up after exports to this place that were killed, and put back a bundle that they set aside."""
        pattern = re.compile(rf"\.{re.escape(self.place.name)}\.[0-9a-f]{{16}}\.partial")
        with suppress(OSError):  # no such folder, or not ours to read
            for work in [*self.place.parent.iterdir()]:
                if pattern.fullmatch(work.name):
                    self._recover(work)

    def check(self, checkpoint: Path) -> None:
        """Refuse a place where the bundle cannot be published, before the work.

        Raises:
            ExportError: something is in the way that is not ours to replace, or nothing can be written there.
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
        """A fresh folder to write the bundle in, gone when the block ends, unless it was published.

        Raises:
            ExportError: of any OSError in the block; a full disk shows at any of the files.
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
                    with suppress(OSError):  # not empty: the bundle is there
                        folder.rmdir()

    def publish(self, folder: Path) -> None:
        """Give a whole bundle, written in the folder of :meth:`staged`, its place and name.

        Raises:
            ExportError: something that may not be replaced came there during the export.
        """
        if not self._occupied():
            with suppress(FileNotFoundError):
                self.place.rmdir()  # an empty one, onto which Windows renames nothing
            folder.rename(self.place)
            return
        self._require_replaceable()
        if not _exchange(folder, self.place):
            # Whatever ends this process between the two, `_recover` puts the old bundle back.
            self.place.rename(folder.with_name(REPLACED))
            folder.rename(self.place)

    # What may be there ----------------------------------------------------------------------------

    def _occupied(self) -> bool:
        return self.place.is_dir() and any(self.place.iterdir())

    def _require_name(self) -> None:
        if max(len(os.fsencode(name)) for name in (*self.place.parts, self._working_name())) > LONGEST_NAME:
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
        """A folder is published by a rename, which the system refuses for some, and which would move the user."""
        if any(self.place in (mount, *mount.parents) for mount in _mounts(self.place)):
            raise ExportError(
                f"{self.bundle} is or holds a mount point, which no bundle can replace; "
                f"name a new folder in it, as {self.bundle / 'bundle'}"
            )
        with suppress(OSError):  # the current folder was deleted
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
        """A new working folder and its lock; None where the file system has no locks."""
        while True:
            work = self.place.with_name(self._working_name())
            work.mkdir()
            try:
                return work, lock(work / LOCK)
            except (BlockingIOError, FileNotFoundError):
                continue  # another export took the folder for a dead one
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    self._end(work, None)
                    raise
                return work, None

    def _recover(self, work: Path) -> None:
        """If no living export holds the folder, end what a dead one left in it."""
        try:
            held = lock(work / LOCK)
        except OSError:  # another export has it, or the file system cannot tell
            return
        self._end(work, held)

    def _end(self, work: Path, held: int | None) -> None:
        """Empty a working folder, and remove it with its lock, which Windows unlinks only when it is closed."""
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
        """Whether nothing that is worth keeping is left in it; what an export set aside is put back."""
        new, replaced = work / NEW, work / REPLACED
        if replaced.exists() and new.exists():  # the export ended between the two renames
            try:
                replaced.rename(self.place)
            except OSError:  # something else is there now, and this is the only copy
                return False
        for folder in (new, replaced):
            shutil.rmtree(folder, ignore_errors=True)
        return True


def _files_of_ours(folder: Path) -> set[str] | None:
    """The names of a bundle's files by its manifest, of any version of the schema; None if it is not ours."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files, tools = manifest["files"], manifest["tools"]
        ours = (
            isinstance(manifest["schema_version"], int)
            and isinstance(manifest["source_sha256"], str)
            and "glm4-deploy" in tools
            and all(entry.keys() >= {"sha256", "bytes"} for entry in files.values())
        )
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    return {*files, MANIFEST, REPORT} if ours else None


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change their names in one step; False where the system cannot."""
    import ctypes  # here, since a command's help is quicker without it

    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other)
    return renameat2 is not None and renameat2(*paths, RENAME_EXCHANGE) == 0


def _mounts(place: Path) -> Iterator[Path]:
    """The mount points of this machine that may matter to ``place``."""
    if os.path.ismount(place):
        yield place
    with suppress(OSError):  # not Linux, or no /proc
        for line in MOUNTS.read_bytes().splitlines():
            escaped = line.split(b" ")[4]  # space, tab, newline and backslash are written as \040 and so on
            yield Path(os.fsdecode(re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), escaped)))
