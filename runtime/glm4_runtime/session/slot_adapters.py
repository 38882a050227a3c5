"""The LoRA adapter of each slot of a session."""

import abc
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glm4_runtime.errors import BundleError, RequestError, SlotError
from glm4_runtime.kv_cache import SlotTable


class SlotAdapters(abc.ABC):
    """The part of a session that knows adapters. A session whose bundle takes adapters overrides
    ``adapters``, ``load_adapter`` and ``_unload_adapter``.

    Attributes:
        adapter: the adapter of sequences for which :meth:`use_adapter` chose none. None: the base model.
    """

    folder: Path
    max_batch_size: int
    adapter: str | None
    _slots: SlotTable
    _adapter_of: dict[int, str | None]  # by slot, also of free slots for which one is chosen

    @property
    def adapters(self) -> Sequence[str]:
        """The names of the loaded LoRA adapters."""
        return ()

    @property
    def adapter_bytes(self) -> int:
        """The memory of all loaded adapters."""
        return 0

    def load_adapter(self, name: str, folder: str | Path) -> None:  # noqa: ARG002  a bundle without slots
        """Load a LoRA adapter from its folder.

        Raises:
            BundleError: the bundle takes no adapters. CheckpointError: the adapter is damaged or does not fit.
            RequestError: the name is taken, or all slots are.
        """
        raise BundleError(
            f"{self.folder} takes no adapters at run time; export it with --lora-slots 8, or merge the adapter with --lora"
        )

    def adapter_digest(self, name: str) -> str:
        """SHA-256 of the matrices of a loaded adapter. Raises :class:`RequestError` if there is no such adapter."""
        self._require_adapter(name)
        raise NotImplementedError

    def unload_adapter(self, name: str) -> None:
        """Free a loaded adapter.

        Raises:
            RequestError: no such adapter. SlotError: a slot has it; release the slot first.
        """
        self._require_adapter(name)
        slots = sorted(slot for slot, used in self._adapter_of.items() if used == name)
        if slots:
            raise SlotError(f"slot {slots[0]} has the adapter {name!r}; release the slot first")
        self._unload_adapter(name)
        if self.adapter == name:
            self.adapter = None

    def _unload_adapter(self, name: str) -> None:  # noqa: B027  a session without adapters has nothing to free
        """Free the memory of a loaded adapter that no slot has."""

    def use_adapter(self, slot: int, name: str | None) -> None:
        """Choose the adapter of a free slot's next sequence, until :meth:`release`. None: the base model.

        Raises:
            RequestError: no such adapter. SlotError: the slot is in use.
        """
        self._require_slot(slot)
        if slot in self._slots:
            raise SlotError(f"slot {slot} is in use; release it first")
        if name is not None:
            self._require_adapter(name)
        self._adapter_of[slot] = name

    def adapter_of(self, slot: int) -> str | None:
        """The adapter of a slot's sequence, or of its next one. None: the base model."""
        self._require_slot(slot)
        return self._adapter_of.get(slot, self.adapter)

    def _require_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise RequestError(
                f"no adapter {name!r} is loaded; loaded are: {', '.join(self.adapters) or 'none'}"
            )

    def _require_slot(self, slot: int, in_use: bool = False) -> None:
        if (
            isinstance(slot, bool)
            or not isinstance(slot, int | np.integer)
            or not 0 <= slot < self.max_batch_size
        ):
            raise SlotError(
                f"slot {slot!r} does not exist; this session has slots 0 ... {self.max_batch_size - 1}"
            )
        if in_use and slot not in self._slots:
            raise SlotError(f"slot {slot} is not in use; prefill it first")
