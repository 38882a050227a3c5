"""``glm4::LoraProduct``: y + (x A) B for the LoRA adapter of each sequence.

Inputs: x float32 [sequences, length, inputs]; y float32 [sequences, length, outputs], the base product's result; rows
int64 [sequences], each sequence's adapter or -1; places int64 [adapters, matrices, 2, 5]; then each adapter as float16
[elements]. Attributes: matrix, the index in ``places``; gated (0 or 1). Output: float32 like y; gated, silu(first half
of the columns) * second half.

A matrix of an adapter has up to two parts. An entry of ``places`` is rank (0: no part), position of A [inputs, rank],
position of B, B's first panel and number of panels. B is [panels, rank, 64], and follows A.

:func:`lora_product` is the specification of the operator. ``cpu/lora.h`` describes the order of the sums.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from glm4_plugins.block_product import PANEL

OPERATOR = "LoraProduct"

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]


def lora_product(
    x: Floats, y: Floats, entries: Sequence[Sequence[int]], elements: Halves, *, gated: bool = False
) -> Floats:
    """The operator for one adapter in NumPy and float64: x [rows, inputs], y [rows, outputs], entries [2, 5]."""
    inputs, outputs = x.shape[1], y.shape[1]
    total = y.astype(np.float64)
    for rank, a, b, first, panels in entries:
        if rank == 0:
            continue
        right = elements[a : a + inputs * rank].reshape(inputs, rank).astype(np.float64)
        stored = elements[b : b + panels * rank * PANEL].reshape(panels, rank, PANEL).astype(np.float64)
        left = stored.transpose(1, 0, 2).reshape(rank, -1)
        columns = slice(first * PANEL, min((first + panels) * PANEL, outputs))
        total[:, columns] += (x @ right @ left)[:, : columns.stop - columns.start]
    if gated:
        gate, up = np.split(total, 2, axis=-1)
        total = gate / (1 + np.exp(-gate)) * up
    result: Floats = total.astype(np.float32)
    return result
