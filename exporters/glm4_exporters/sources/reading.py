"""Reads and dequantizes views in blocks of rows."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from glm4_exporters.safetensors_file import TensorHeader
from glm4_exporters.sources.base import Read
from glm4_exporters.sources.view import StoredRows, View
from glm4_exporters.weight_reader import ROWS_TOGETHER
from glm4_runtime.errors import CheckpointError


def view_blocks(view: View, read: Read, room: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each block's first row and its values, float32 [rows, ...], in at most ``room`` bytes per block."""
    start = 0
    step = max(1, room // max(1, view.header.nbytes // view.header.shape[0]))
    step -= step % ROWS_TOGETHER if step > ROWS_TOGETHER else 0
    for piece in view.pieces:
        rows = _rows_of(piece, read)
        for first in range(0, piece.count, step):
            count = min(step, piece.count - first)
            yield start + first, rows(piece.first + first, count)
        start += piece.count


def _rows_of(piece: StoredRows, read: Read) -> Callable[[int, int], Tensor]:
    """A function of ``first`` and ``count`` that returns these rows of the piece's stored matrix, float32."""
    stored = piece.stored
    if isinstance(stored, TensorHeader):
        whole, file, name = read(stored), stored.file, stored.name
        return lambda first, count: _finite(whole[first : first + count].float(), file, name, first)
    load, module = stored.load(read), stored.module
    file = next(iter(stored.tensors.values())).file
    return lambda first, count: _finite(load(first, count).values(), file, module, first)


def _finite(values: Tensor, file: Path, name: str, first: int) -> Tensor:
    """Refuse NaN and infinity. A float8 number may be NaN; number * scale may overflow."""
    if not bool(values.isfinite().all()):
        raise CheckpointError(
            f"{file}: {name} stands for NaN or infinity in rows {first} ... {first + len(values) - 1}; "
            "the checkpoint is damaged"
        )
    return values
