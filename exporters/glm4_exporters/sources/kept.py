"""Copies the numbers of quantized matrices into a bundle, bit for bit."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm4_exporters.formats.base import CODES, SCALES, Encoded
from glm4_exporters.formats.brought import ZEROS, Brought
from glm4_exporters.formats.brought_float4 import BroughtFloat4
from glm4_exporters.formats.nvfp4 import TOTAL
from glm4_exporters.sources.base import QuantizedMatrix, Read, Rows
from glm4_exporters.sources.reading import finite_rows
from glm4_exporters.sources.view import View
from glm4_runtime.bundle.safetensors_file import TensorHeader

COPIED_AT_ONCE = 4096


@dataclass(frozen=True)
class _Piece:
    """Rows ``start ... end - 1`` of a view, which are rows ``first`` and later of a stored matrix."""

    start: int
    end: int
    first: int
    load: Callable[[int, int], Rows]

    def rows(self, start: int, end: int) -> Rows:
        """Rows ``start ... end - 1`` of the view."""
        return self.load(self.first + start - self.start, end - start)


class KeptMatrix:
    """The encoded parts of one matrix. The stored tensors are read in :meth:`blocks`.

    Args:
        view: a view of quantized matrices only.
        form: the target's format, whose block size divides the group size.
    """

    def __init__(self, view: View, form: Brought, read: Read) -> None:
        self._view, self._form, self._read = view, form, read
        self._pieces: list[_Piece] = []
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """SHA-256, in hex, of the stored tensors read so far."""
        return self._digest.hexdigest()

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Open the matrix, and yield each block's first row and a meta tensor of the block's shape."""
        self._open()
        rows, width = self._view.header.shape
        for first in range(0, rows, COPIED_AT_ONCE):
            yield first, torch.empty(min(COPIED_AT_ONCE, rows - first), width, device="meta")

    def rows(self, first: int, count: int) -> Encoded:
        found = [
            self._encoded(piece.rows(max(first, piece.start), min(first + count, piece.end)))
            for piece in self._pieces
            if piece.start < first + count and piece.end > first
        ]
        if len(found) == 1:
            return found[0]
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}

    def written(self) -> None:
        self._pieces = []

    def _open(self) -> None:
        start = 0
        for piece in self._view.pieces:
            assert isinstance(piece.stored, QuantizedMatrix)
            load = finite_rows(piece.stored, self._hashed)
            self._pieces.append(_Piece(start, start + piece.count, piece.first, load))
            start += piece.count

    def _hashed(self, header: TensorHeader) -> Tensor:
        tensor = self._read(header)
        self._digest.update(f"{header.name} {header.dtype} {list(header.shape)}\n".encode())
        self._digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return tensor

    def _encoded(self, rows: Rows) -> Encoded:
        form, width = self._form, rows.numbers.shape[1]
        short = form.stored_width(width) - width
        own = rows.without_zeros() if form.folded else rows.numbers
        numbers = torch.nn.functional.pad(own, (0, short)) if short else own
        if isinstance(form, BroughtFloat4):
            assert rows.levels is not None
            return {CODES: numbers, SCALES: rows.levels[0], TOTAL: rows.levels[1]}
        parts = {CODES: numbers, SCALES: self._by_block(rows.scales, rows)}
        if form.zeros:
            assert rows.zeros is not None
            parts[ZEROS] = self._by_block(rows.zeros, rows)
        return parts

    def _by_block(self, by_group: Tensor, rows: Rows) -> Tensor:
        """Convert values per group [rows, groups] to values per block [rows, blocks], or [rows] without blocks."""
        form, width = self._form, rows.numbers.shape[1]
        if form.block is None:
            return by_group[:, 0].contiguous()
        starts = torch.arange(form.blocks(width)) * form.block
        groups = rows.groups[starts] if rows.groups is not None else starts * by_group.shape[1] // width
        return by_group[:, groups].contiguous()
