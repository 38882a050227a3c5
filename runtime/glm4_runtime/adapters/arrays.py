"""The matrices of an adapter that a session applies at run time, as float16 arrays."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from glm4_runtime.adapters.adapter import AdapterFolder, LowRankTensors, Shapes
from glm4_runtime.adapters.base_model import require_base
from glm4_runtime.adapters.modules import EMBEDDING, HEAD
from glm4_runtime.bundle import AdapterSlots, Manifest
from glm4_runtime.errors import some

Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]

MERGE = "merge it with export --lora"


@dataclass(frozen=True)
class AdapterPart:
    """The change of rows ``first`` ... of a matrix [outputs, inputs], by an adapter of rank r.

    Attributes:
        matrix: name of the matrix, without ``.weight``.
        right: A, transposed, [inputs, r].
        left: s·B, transposed, [r, rows].
    """

    matrix: str
    first: int
    right: Halves
    left: Halves


def read_parts(folder: str | Path, manifest: Manifest, slots: AdapterSlots) -> Iterator[AdapterPart]:
    """Check an adapter, then read its matrices one after the other.

    The factor s is part of ``left``, rounded once. A power of two moves between A and B, so that both have the same
    largest magnitude, and neither overflows float16.

    Raises:
        CheckpointError: the adapter is damaged, is for another model, or must be merged. Raised by the first step,
            unless values are not finite.
    """
    adapter = AdapterFolder(folder)
    try:
        changes = _checked(adapter, manifest, slots)
        for change in changes:
            left = adapter.read(change.left) * np.float32(change.scaling)
            right = adapter.read(change.right)
            yield AdapterPart(change.matrix, change.first, *_halves(adapter, change.matrix, right.T, left.T))
    finally:
        adapter.close()


def _checked(adapter: AdapterFolder, manifest: Manifest, slots: AdapterSlots) -> list[LowRankTensors]:
    """All changes of the adapter. Refuses changes that are not s·B·A of a matrix in ``slots``."""
    model = manifest.model
    ours = frozenset([] if slots.base is None else [slots.base])
    require_base(adapter.folder, adapter.config.base, ours, (model.hidden_size, model.num_layers))
    if adapter.config.dora:
        adapter.refuse(f"has DoRA's magnitudes, which no request can choose; {MERGE}")
    if adapter.config.biased:
        adapter.refuse(f"has biases of B (lora_bias), which no request can choose; {MERGE}")
    if adapter.whole:
        adapter.refuse(f"stores {some(adapter.whole)} whole, which no request can choose; {MERGE}")
    matrices = {f"{name}.weight": (shape[0], shape[1]) for name, shape in slots.matrices.items()}
    expected: Shapes = {EMBEDDING: (model.vocab_size, model.hidden_size), **matrices}
    changes = []
    for change in adapter.changes(expected, tied=HEAD not in matrices):
        assert isinstance(change, LowRankTensors)
        if f"{change.matrix}.weight" not in matrices:
            adapter.refuse(f"changes {change.matrix}, which no request can choose; {MERGE}")
        rank = change.left.shape[1]
        if rank > slots.rank:
            adapter.refuse(
                f"has rank {rank} in {change.matrix}, but this bundle takes at most {slots.rank}; "
                f"export it with --lora-rank {rank}"
            )
        changes.append(change)
    if not changes:
        adapter.refuse("changes no matrix")
    return changes


def _halves(adapter: AdapterFolder, matrix: str, right: Floats, left: Floats) -> tuple[Halves, Halves]:
    """Both factors in float16, with equal largest magnitudes."""
    most = float(np.abs(right).max()), float(np.abs(left).max())
    shift = round((math.log2(most[0]) - math.log2(most[1])) / 2) if all(most) else 0
    scaled = np.ldexp(right, -shift), np.ldexp(left, shift)
    with np.errstate(over="ignore"):
        halves = scaled[0].astype(np.float16), scaled[1].astype(np.float16)
    if not all(np.isfinite(half).all() for half in halves):
        adapter.refuse(f"has values in {matrix} that are too large for float16; {MERGE}")
    return halves
