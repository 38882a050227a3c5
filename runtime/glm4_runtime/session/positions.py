"""Copies positions of a slot's cache to and from arrays on the host."""

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_runtime.errors import BundleError, SlotError
from glm4_runtime.kv_cache import SlotTable
from glm4_runtime.session.slot_adapters import SlotAdapters


class SlotPositions(SlotAdapters):
    """The part of a session that copies positions. A session whose cache lies in host memory overrides
    ``copies_positions``, ``kernels``, ``_read_row`` and ``_write_row``."""

    max_seq_len: int
    provider: str
    _slots: SlotTable

    @property
    def copies_positions(self) -> bool:
        """Whether :meth:`read_positions` and :meth:`append_positions` work."""
        return False

    @property
    def kernels(self) -> Mapping[str, str]:
        """The versions of everything that computes keys and values."""
        return {}

    def read_positions(self, slot: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Copy positions ``start`` ... ``stop`` - 1 of a slot: keys and values [2 * layers, Hkv, positions, D].

        Raises:
            SlotError: the slot does not hold them. BundleError: the cache is not in host memory.
        """
        self._require_slot(slot, in_use=True)
        if not 0 <= start <= stop <= self._slots.length(slot):
            raise SlotError(
                f"slot {slot} holds {self._slots.length(slot)} positions, not positions {start} ... {stop}"
            )
        return self._read_row(self._slots.row(slot), start, stop)

    def append_positions(self, slot: int, block: npt.NDArray[Any], expected: int = 0) -> None:
        """Append positions that :meth:`read_positions` gave for the same tokens, also to a free slot.

        Args:
            expected: positions that the slot will have soon. The cache grows to them at once, instead of by doubling.

        Raises:
            SlotError: no room for them. BundleError: the cache is not in host memory.
        """
        self._require_slot(slot)
        length, count = self._slots.length(slot), block.shape[2]
        if length + count > self.max_seq_len:
            raise SlotError(
                f"slot {slot} holds {length} of {self.max_seq_len} positions and has no room for {count} more; "
                "truncate or release it"
            )
        is_new = slot not in self._slots
        if is_new:
            self._adapter_of.setdefault(slot, self.adapter)
            self._slots.add(slot)
        try:
            self._slots.expect(slot, min(expected, self.max_seq_len))
            self._fit_cache(max(self._slots.needed(), length + count))
            self._write_row(self._slots.row(slot), length, np.asarray(block))
        except BaseException:
            self._slots.expect(slot, 0)
            if is_new:
                self.release(slot)
            raise
        self._slots.set_length(slot, length + count)

    def require_host_cache(self) -> None:
        """Raises :class:`BundleError` if the cache is not in host memory."""
        if not self.copies_positions:
            raise BundleError(
                f"--cache needs a KV cache in host memory, but {self.folder} runs on {self.provider or 'a GPU'}; "
                "leave --cache out, or open the bundle with --provider CPUExecutionProvider"
            )

    def _read_row(self, row: int, start: int, stop: int) -> npt.NDArray[Any]:  # noqa: ARG002  see the class
        self.require_host_cache()
        raise NotImplementedError

    def _write_row(self, row: int, start: int, block: npt.NDArray[Any]) -> None:  # noqa: ARG002  see the class
        self.require_host_cache()
        raise NotImplementedError

    @abc.abstractmethod
    def _fit_cache(self, needed: int) -> None: ...

    @abc.abstractmethod
    def release(self, slot: int) -> None: ...
