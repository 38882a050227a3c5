"""Reads and dequantizes views in blocks of rows."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from glm4_exporters.sources.base import QuantizedMatrix, Read, Rows
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
    if isinstance(stored, QuantizedMatrix):
        load = finite_rows(stored, read)
        return lambda first, count: load(first, count).values()
    whole, header = read(stored), stored

    def rows(first: int, count: int) -> Tensor:
        values = whole[first : first + count].float()
        if not bool(values.isfinite().all()):
            raise _damaged(header.file, header.name, first, count)
        return values

    return rows


def finite_rows(stored: QuantizedMatrix, read: Read) -> Callable[[int, int], Rows]:
    """As ``stored.load``, and refuses rows whose values are not all finite.

    Raises:
        CheckpointError: also by the returned function.
    """
    load, file = stored.load(read), next(iter(stored.tensors.values())).file

    def rows(first: int, count: int) -> Rows:
        found = load(first, count)
        if not found.finite():
            raise _damaged(file, stored.module, first, count)
        return found

    return rows


def _damaged(file: Path, name: str, first: int, count: int) -> CheckpointError:
    return CheckpointError(
        f"{file}: {name} stands for NaN or infinity in rows {first} ... {first + count - 1}; "
        "the checkpoint is damaged"
    )
