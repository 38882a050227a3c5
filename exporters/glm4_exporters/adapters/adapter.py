"""Merges LoRA adapters into a checkpoint's weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from glm4_exporters.adapters.changes import Added, Change, LowRank
from glm4_runtime.adapters.adapter import AdapterFolder, LowRankTensors, ModuleParts, Shapes, WholeTensor
from glm4_runtime.bundle.safetensors_file import TensorHeader
from glm4_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Merged:
    """The changes that adapters make to a checkpoint's weights.

    Attributes:
        expected: shapes of the exported weights, by canonical name.
        tied: whether the LM head shares the embedding's weight.
        ignored: canonical names of weights that the task does not use. Changes of these weights are skipped.
        whole: tensors that replace the checkpoint's, by canonical name.
        changes: changes of each weight in order of application, by canonical name.
    """

    expected: Shapes
    tied: bool = False
    ignored: frozenset[str] = frozenset()
    whole: ModuleParts = field(default_factory=dict)
    changes: dict[str, list[Change]] = field(default_factory=dict)


class Adapter(AdapterFolder):
    """An open adapter that is merged.

    Attributes:
        scale: a factor for all changes of the adapter, beside alpha / rank.
    """

    def __init__(self, folder: str | Path, scale: float = 1.0) -> None:
        """Open an adapter's folder. Reads no tensor.

        Raises:
            CheckpointError: the folder holds no adapter, or an adapter that cannot be merged.
        """
        if not math.isfinite(scale):
            raise CheckpointError(f"the scale of {folder} is {scale}, but must be a finite number")
        super().__init__(folder)
        self.scale = scale

    def add_to(self, merged: Merged) -> None:
        """Append the changes of this adapter to the changes of earlier adapters.

        Raises:
            CheckpointError: the model lacks a changed weight, or the adapter lacks a weight of its configuration.
        """
        for change in self.changes(merged.expected, tied=merged.tied, ignored=merged.ignored):
            if isinstance(change, WholeTensor):
                self._replace(merged, change)
            else:
                self._adapt(merged, change)

    def _replace(self, merged: Merged, tensor: WholeTensor) -> None:
        """Replace a weight by the adapter's tensor. A trained tensor cannot have the adapter's scale."""
        name = tensor.name
        if name in merged.whole:
            self.refuse(f"replaces {name}, as another adapter does; give one of them")
        if self.scale != 1 and not tensor.adapted:
            self.refuse(f"stores {name} whole, which has no scale; give it without ={self.scale:g}")
        merged.whole[name] = tensor.header

    def _adapt(self, merged: Merged, part: LowRankTensors) -> None:
        scaling, read = self.scale * part.scaling, self._turned if part.lookup else self._tensor
        magnitude = None if part.magnitude is None else partial(self._tensor, part.magnitude)
        factors = partial(read, part.left), partial(read, part.right)
        change = LowRank(part.first, part.rows, scaling, *factors, magnitude)
        merged.changes.setdefault(f"{part.matrix}.weight", []).append(change)
        if part.bias is not None:
            added = Added(part.first, part.bias.shape[0], scaling, partial(self._tensor, part.bias))
            merged.changes.setdefault(f"{part.matrix}.bias", []).append(added)

    def _tensor(self, header: TensorHeader) -> "Tensor":
        """Read a tensor as float32. Refuses NaN and infinity."""
        import torch

        return torch.from_numpy(self.read(header))

    def _turned(self, header: TensorHeader) -> "Tensor":
        return self._tensor(header).T.contiguous()


def merge(adapters: Iterable[Adapter], merged: Merged) -> Merged:
    """Add the changes of all adapters, in order, to ``merged`` and return it."""
    for adapter in adapters:
        adapter.add_to(merged)
    return merged
