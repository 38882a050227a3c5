"""How the parts of a matrix lie in the data file, for the operator that reads them.

    ROWS       as the format says; 4-bit codes two in a byte: DequantizeLinear
    COLUMNS    the same, transposed: DequantizeLinear with the inputs on axis 0
    UNSIGNED   codes with an offset, rows padded to whole blocks: MatMulNBits, GatherBlockQuantized
    PANELS     the same in panels of 64 rows: ``glm4::BlockQuantizedMatMul``

``pack`` packs some rows, on any thread. ``written`` then yields the bytes for the file, in order.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glm4_exporters.formats.base import CODES, SCALES, Part, StoredFormat
from glm4_exporters.formats.brought import ZEROS
from glm4_exporters.formats.integers import IntegerCodes
from glm4_plugins.block_product import PANEL, stored_shape
from glm4_runtime.bundle.element_types import bits

COLUMN_BLOCK = 512  # columns that are transposed at once: 78 MB for a vocabulary's head


@dataclass(frozen=True)
class Arrangement:
    """Rows one after the other, without padding."""

    def part(self, _name: str, part: Part, _form: StoredFormat) -> Part:
        """The part as the file holds it."""
        return part

    def pack(self, _name: str, values: Tensor, part: Part, _form: StoredFormat) -> Tensor:
        """Some rows of a part, as bytes or numbers in the order of the file."""
        rows = _exact(values, part)
        return pack_pairs(_in_pairs(rows)) if bits(part.dtype) < 8 else rows

    def written(self, chunks: Iterable[Tensor], _part: Part) -> Iterator[Tensor]:
        """The packed rows, in the order of the file."""
        yield from chunks


class _Columns(Arrangement):
    """The transpose. A whole part is in memory while it is written."""

    def part(self, _name: str, part: Part, _form: StoredFormat) -> Part:
        return replace(part, shape=part.shape[::-1])

    def pack(self, _name: str, values: Tensor, part: Part, _form: StoredFormat) -> Tensor:
        return _exact(values, part)

    def written(self, chunks: Iterable[Tensor], part: Part) -> Iterator[Tensor]:
        if len(part.shape) < 2:
            yield from chunks
            return
        whole, filled = torch.empty(0), 0
        for chunk in chunks:
            if not filled:
                whole = chunk.new_empty(part.shape)
            whole[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        for start in range(0, whole.shape[1], COLUMN_BLOCK):
            turned = whole[:, start : start + COLUMN_BLOCK].t().contiguous()
            yield pack_pairs(turned) if bits(part.dtype) < 8 else turned


class _Unsigned(Arrangement):
    """Codes uint8 [rows, blocks, bytes]; the last block of a row is padded with zeros."""

    def part(self, name: str, part: Part, form: StoredFormat) -> Part:
        if name == ZEROS:
            return Part("uint8", (part.shape[0], -(-part.shape[1] * form.bits // 8)), part.scaled_by)
        if name != CODES:
            return part
        assert isinstance(form, IntegerCodes)
        assert form.block is not None
        rows, width = part.shape
        return Part("uint8", (rows, form.blocks(width), form.block * form.bits // 8), part.scaled_by)

    def pack(self, name: str, values: Tensor, part: Part, form: StoredFormat) -> Tensor:
        assert isinstance(form, IntegerCodes)
        if name == ZEROS and form.bits == 4:
            values = torch.nn.functional.pad(values, (0, values.shape[1] % 2))
        return values if name == SCALES else _pack_unsigned(values, form)


class _Panels(Arrangement):
    """Panels of 64 rows, the last padded with zeros: codes uint8 [panels, blocks, bytes], scales [panels, blocks, 64].

    Zero points are int8 [panels, blocks, 64].
    """

    def part(self, name: str, part: Part, form: StoredFormat) -> Part:
        assert isinstance(form, IntegerCodes)
        assert form.block is not None
        rows, columns = part.shape
        if name == CODES:
            return Part("uint8", stored_shape(rows, columns, form.bits, form.block), part.scaled_by)
        dtype = "int8" if name == ZEROS else part.dtype
        return replace(part, dtype=dtype, shape=(-(-rows // PANEL), columns, PANEL))

    def pack(self, name: str, values: Tensor, part: Part, form: StoredFormat) -> Tensor:
        assert isinstance(form, IntegerCodes)
        return pack_panels(values, form) if name == CODES else scale_panels(values)


ROWS, COLUMNS, UNSIGNED, PANELS = Arrangement(), _Columns(), _Unsigned(), _Panels()


def _exact(values: Tensor, part: Part) -> Tensor:
    """Drop the codes beyond the width of the matrix."""
    return values[:, : part.shape[1]].contiguous() if len(part.shape) == 2 else values


def _in_pairs(rows: Tensor) -> Tensor:
    """Rows of an odd width as one row, filled up to an even one: its numbers lie two in a byte across rows."""
    if rows.dim() == 2 and rows.shape[1] % 2 == 0:
        return rows
    flat = rows.reshape(1, -1)
    return torch.nn.functional.pad(flat, (0, flat.shape[1] % 2))


def pack_pairs(codes: Tensor) -> Tensor:
    """Pack 4-bit codes [rows, width], one per byte, into two per byte; the first goes into the low half."""
    pairs = codes.contiguous().view(torch.int16)  # the second code in the high byte
    return ((pairs & 0x0F) | ((pairs >> 4) & 0xF0)).to(torch.uint8)


def _pack_unsigned(codes: Tensor, form: IntegerCodes) -> Tensor:
    return codes.view(torch.uint8) ^ 0x80 if form.bits == 8 else pack_pairs(codes + form.zero)


def pack_panels(codes: Tensor, form: IntegerCodes) -> Tensor:
    """int8 codes [rows, blocks * block] -> uint8 [panels, blocks, bytes]."""
    assert form.block is not None
    rows = _whole_panels(codes)
    unsigned = (rows.view(torch.uint8) ^ 0x80) if form.bits == 8 else (rows + form.zero).view(torch.uint8)
    fours = unsigned.view(torch.int32)  # the four inputs of a group move as one
    if form.bits == 4:
        fours = fours[:, 0::2] | fours[:, 1::2] << 4
    groups = fours.view(len(rows) // PANEL, PANEL, codes.shape[1] // form.block, -1)
    return groups.permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(2)


def scale_panels(scales: Tensor) -> Tensor:
    """Scales [rows, blocks] -> [panels, blocks, 64], zero past the rows."""
    return _whole_panels(scales).view(-1, PANEL, scales.shape[1]).transpose(1, 2).contiguous()


def _whole_panels(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % PANEL)).contiguous()
