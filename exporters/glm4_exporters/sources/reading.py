"""The values of views, read and decoded a block of rows at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from glm4_exporters.safetensors_file import TensorHeader
from glm4_exporters.sources.base import Read
from glm4_exporters.sources.view import Piece, View
from glm4_runtime.errors import CheckpointError

ROWS_TOGETHER = 64


def view_blocks(view: View, read: Read, room: int) -> Iterator[tuple[int, Tensor]]:
    """A view in blocks of as many whole rows as ``room`` bytes hold, float32, and the first row of each."""
    start = 0
    step = max(1, room // max(1, view.header.nbytes // view.header.shape[0]))
    step -= step % ROWS_TOGETHER if step > ROWS_TOGETHER else 0
    for piece in view.pieces:
        rows = _rows_of(piece, read)
        for first in range(0, piece.count, step):
            count = min(step, piece.count - first)
            yield start + first, rows(piece.first + first, count)
        start += piece.count


def _rows_of(piece: Piece, read: Read) -> Callable[[int, int], Tensor]:
    """``count`` rows from row ``first`` on of what a piece is cut from."""
    stored = piece.stored
    if isinstance(stored, TensorHeader):
        whole, file, name = read(stored), stored.file, stored.name
        return lambda first, count: _finite(whole[first : first + count].float(), file, name, first)
    load, module = stored.load(read), stored.module
    file = next(iter(stored.tensors.values())).file
    return lambda first, count: _finite(load(first, count).values(), file, module, first)


def _finite(values: Tensor, file: Path, name: str, first: int) -> Tensor:
    """Refuse NaN and infinity: a float8 number may be NaN, and a product of two finite numbers infinite."""
    if not bool(values.isfinite().all()):
        raise CheckpointError(
            f"{file}: {name} stands for NaN or infinity in rows {first} ... {first + len(values) - 1}; "
            "the checkpoint is damaged"
        )
    return values
