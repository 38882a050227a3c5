"""A session whose KV cache grows and shrinks with what it holds."""

import abc
from pathlib import Path

from glm4_runtime.bundle import Manifest
from glm4_runtime.errors import SlotError
from glm4_runtime.kv_cache import bucket
from glm4_runtime.session.base import Session


class GrowingSession(Session):
    """The capacity of every row is a bucket (:func:`bucket`), the same for all rows."""

    def __init__(self, folder: Path, manifest: Manifest, max_seq_len: int, max_batch_size: int) -> None:
        super().__init__(folder, manifest, max_seq_len, max_batch_size)
        self._capacity = 0

    @abc.abstractmethod
    def _resize_cache(self, capacity: int) -> None:
        """Give the cache another capacity. The positions in use keep their contents. May raise MemoryError."""

    def _fit_cache(self, needed: int) -> None:
        """Grow the cache by doubling; shrink it when only a quarter is in use."""
        capacity = bucket(needed, self.max_seq_len)
        if capacity > self._capacity or 4 * capacity <= self._capacity:
            try:
                self._resize_cache(capacity)
            except MemoryError as error:
                raise SlotError(
                    f"no memory for a KV cache of {self.max_batch_size} slots of {capacity} positions; "
                    "open the session with a lower max_batch_size or max_seq_len"
                ) from error
            self._capacity = capacity
