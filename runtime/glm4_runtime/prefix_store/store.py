"""Reads and writes pieces on threads of its own, and keeps the folder within its size."""

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from glm4_runtime.arrays import Ids
from glm4_runtime.bundle.element_types import CACHE_TYPES
from glm4_runtime.errors import RequestError
from glm4_runtime.prefix_store.chain import Chain, Reading
from glm4_runtime.prefix_store.facts import facts_of
from glm4_runtime.prefix_store.folder import CacheFolder, remove, write_atomically
from glm4_runtime.prefix_store.piece import TOKENS, Block, Layout, encoded, names_of, read
from glm4_runtime.session.base import Session

logger = logging.getLogger(__name__)

_MOST_QUEUED = 256 << 20  # bytes that wait to be written; further pieces are dropped
_PAUSE = 60.0  # seconds without writing after the disk refused
_SLACK = 64  # a shrink frees 1/64 more than it must, so that not each write needs one
_READERS = 2
_LEAST_PIECES = 8  # that the folder must have room for


class PrefixStore:
    """The cache of one session. All methods but :meth:`read_piece` belong to the session's thread.

    Errors of the disk never reach a caller: one line of the log, and the prompt is computed.
    """

    def __init__(self, folder: Path, most_bytes: int, session: Session) -> None:
        """
        Raises:
            BundleError: the session's cache is not in host memory. RequestError: the folder cannot be used, or
                ``most_bytes`` is less than a short prompt needs.
        """
        session.require_host_cache()
        self._folder, self._most, self._session = CacheFolder(folder), most_bytes, session
        self._folder.prepare()
        model, stored = session.manifest.model, CACHE_TYPES[str(session.manifest.kv_cache)]
        self._layout = Layout(
            stored.numpy, (2 * model.num_layers, model.num_kv_heads, TOKENS, stored.row(model.head_dim))
        )
        if most_bytes < _LEAST_PIECES * self._layout.nbytes:
            raise RequestError(
                f"--cache-bytes is {most_bytes}, but {TOKENS} tokens of this model take {self._layout.nbytes} bytes; "
                f"give at least {_LEAST_PIECES * self._layout.nbytes}"
            )
        self._facts: dict[tuple[str, str], str] = {}  # by adapter's digest and group
        self._about: dict[str, dict[str, str]] = {}  # by facts
        self._readers = ThreadPoolExecutor(_READERS, "prefix-reader")
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._queued: dict[Path, int] = {}
        self._total: int | None = None  # bytes in the folder; None: not counted yet
        self._uncounted = 0  # bytes written since the last count
        self._silent_until = 0.0
        self._writer = threading.Thread(target=self._write_all, name="prefix-writer", daemon=True)
        self._writer.start()

    def chain(self, ids: Ids, adapter: str | None, group: str) -> Chain:
        """The pieces of a sequence with this adapter, in this group of requests."""
        digest = "" if adapter is None else self._session.adapter_digest(adapter)
        facts = self._facts.get((digest, group))
        if facts is None:
            facts = self._facts[digest, group] = facts_of(self._session, adapter, group)
            bundle = self._session.folder.resolve().name
            self._about[facts] = {"bundle": bundle, "adapter": adapter or "", "facts": facts}
        whole = ids.astype(np.int32)
        return Chain(facts, self._group(facts), whole, names_of(facts, whole), time.time_ns())

    def present(self, chain: Chain) -> int:
        """The number of first pieces of a chain that are on the disk. They count as used now."""
        count = next((i for i in range(len(chain.names)) if not _exists(chain.path(i))), len(chain.names))
        if count:
            self._work.put(lambda: _touch(chain, range(count)))
        return count

    def reading(self, chain: Chain, indices: Iterable[int], wake: Callable[[], None]) -> Reading:
        """Begin to read pieces. ``wake`` is called from other threads, after each of them."""
        return Reading(self._readers, lambda index: self.read_piece(chain, index), indices, wake)

    def read_piece(self, chain: Chain, index: int) -> Block | None:
        """A piece from the disk. None: there is none, or a wrong one, which is removed."""
        path = chain.path(index)
        try:
            block = read(path, chain.facts, chain.ids_of(index), self._layout)
        except FileNotFoundError:
            return None
        except Exception as error:  # such as too many open files, or too little memory; the file may be good
            logger.warning("%s of the prefix cache cannot be read: %s", path.name, error)
            return None
        if block is None:
            logger.warning("%s of the prefix cache is torn or foreign, and is removed", path.name)
            remove(path)
        return block

    @property
    def busy(self) -> bool:
        """Whether too many bytes wait to be written. Pieces are offered again later."""
        with self._lock:
            return bool(self._queued) and sum(self._queued.values()) + self._layout.nbytes > _MOST_QUEUED

    def wants(self, chain: Chain, index: int) -> bool:
        """Whether a piece is neither on the disk nor on its way, and the disk takes pieces."""
        path = chain.path(index)
        with self._lock:
            if path in self._queued or time.monotonic() < self._silent_until:
                return False
        return not _exists(path)

    def save(self, chain: Chain, index: int, block: Block) -> None:
        """Write a piece, on the writer's thread."""
        with self._lock:
            self._queued[chain.path(index)] = block.nbytes
        self._work.put(lambda: self._write(chain, index, block))

    def flush(self) -> None:
        """Wait until all pieces so far are written."""
        done = threading.Event()
        self._work.put(done.set)
        done.wait()

    def close(self) -> None:
        """Write the pieces that wait, and end the threads."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._work.put(None)
        self._writer.join()

    # The writer's thread -----------------------------------------------------------------------

    def _write_all(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception:
                logger.exception("the prefix cache's writer failed; it goes on")

    def _write(self, chain: Chain, index: int, block: Block) -> None:
        path = chain.path(index)
        try:
            if time.monotonic() < self._silent_until or not _is_finite(block):
                return
            parts = encoded(chain.facts, chain.ids_of(index), self._layout, block)
            self._make_room(sum(len(part) for part in parts))
            self._folder.open_group(chain.folder.name, self._about[chain.facts])
            write_atomically(path, parts)
            _touch(chain, [index])
        except OSError as error:
            self._silent_until = time.monotonic() + _PAUSE
            logger.warning(
                "the prefix cache cannot be written: %s; requests go on, and writing is tried again in %.0f s",
                error.strerror,
                _PAUSE,
            )
        finally:
            with self._lock:
                self._queued.pop(path, None)

    def _make_room(self, size: int) -> None:
        """Remove old pieces so that ``size`` more bytes fit. Other processes' writes are counted now and then."""
        slack = self._most // _SLACK
        if self._total is None or self._uncounted >= slack or self._total + size > self._most:
            self._total = self._folder.shrink(max(0, self._most - size - slack))
            self._uncounted = 0
        self._total += size
        self._uncounted += size

    def _group(self, facts: str) -> Path:
        return self._folder.path / hashlib.sha256(facts.encode()).hexdigest()[:32]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the folder cannot be read any more
        return False


def _touch(chain: Chain, indices: Iterable[int]) -> None:
    for index in indices:
        try:
            os.utime(chain.path(index), ns=(chain.used_ns(index),) * 2)
        except OSError:  # removed meanwhile, or a read-only disk
            return


def _is_finite(block: Block) -> bool:
    return block.dtype.kind != "f" or bool(np.isfinite(block).all())
