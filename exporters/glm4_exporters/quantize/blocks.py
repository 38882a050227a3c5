"""Rows of a matrix to integers and scales, and back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glm4_exporters.quantize.schemes import PANELS, SIGNED, UNSIGNED, Scheme
from glm4_plugins.block_product import PANEL

SMALLEST = 2.0**-100  # size of a scale; a block of zeros has one too


def quantize(
    weight: Tensor, scheme: Scheme, scale_type: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Numbers and scales that lie closest to ``weight``.

    For given numbers q the best scale is sum(w q) / sum(q q), and leaves the squared error
    sum(w w) - sum(w q)^2 / sum(q q). So each range that the scheme tries is judged by its last term; the
    winner's best scale is rounded to ``scale_type``, and the numbers are rounded again under it.

    Args:
        weight: float32 [rows, width].
        scale_type: what scales are stored as.
        importance: float32 [width], how much the square of an input's error counts: the mean of its x^2.

    Returns:
        int8 [rows, blocks * block], zero past the width, and ``scale_type`` [rows, blocks].
    """
    w = _in_blocks(weight, scheme)
    counted = w if importance is None else w * _in_blocks(importance[None], scheme)
    widest = _widest(w, scheme)
    scale = best = None
    for share in scheme.ranges:
        q = rounded(w, _not_zero(widest * share, torch.float32), scheme)
        along = (counted * q).sum(-1, keepdim=True)
        size = (q if importance is None else q * _in_blocks(importance[None], scheme)).mul(q)
        fitted = along / size.sum(-1, keepdim=True)
        removed = along * fitted
        if scale is None or best is None:
            scale, best = fitted, removed
        else:
            scale = torch.where(removed > best, fitted, scale)
            best = torch.maximum(removed, best)
    assert scale is not None
    scale = _not_zero(torch.where(scale.abs() > 0, scale, widest), scale_type)
    numbers = rounded(w, scale, scheme)
    return numbers.to(torch.int8).flatten(1), scale[..., 0].to(scale_type)


def dequantize(numbers: Tensor, scales: Tensor, scheme: Scheme, width: int) -> Tensor:
    """float32 [rows, width] that numbers [rows, blocks * block] and scales [rows, blocks] stand for."""
    return (_in_blocks(numbers.float(), scheme) * scales.float()[..., None]).flatten(1)[:, :width]


def pack_unsigned(numbers: Tensor, scheme: Scheme) -> Tensor:
    """uint8 [rows, blocks * block * bits / 8], with the scheme's zero in the middle."""
    return _packed(numbers.view(torch.uint8) ^ 0x80 if scheme.bits == 8 else numbers + scheme.zero, scheme)


def pack_signed(numbers: Tensor, scheme: Scheme) -> Tensor:
    """The same bytes in two's complement, as uint8."""
    return _packed(numbers.view(torch.uint8) if scheme.bits == 8 else numbers, scheme)


def pack_panels(numbers: Tensor, scheme: Scheme) -> Tensor:
    """The same unsigned numbers as ``glm4::BlockQuantizedMatMul`` reads them, uint8 [panels, blocks, bytes].

    The last panel is filled up with zeros.
    """
    assert scheme.block is not None
    rows = _whole_panels(numbers)
    unsigned = (rows.view(torch.uint8) ^ 0x80) if scheme.bits == 8 else (rows + scheme.zero).view(torch.uint8)
    fours = unsigned.view(torch.int32)  # the four inputs of a group move as one
    if scheme.bits == 4:
        fours = fours[:, 0::2] | fours[:, 1::2] << 4
    groups = fours.view(len(rows) // PANEL, PANEL, numbers.shape[1] // scheme.block, -1)
    return groups.permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(2)


def scale_panels(scales: Tensor) -> Tensor:
    """Scales [rows, blocks] -> [panels, blocks, 64], zero past the rows."""
    return _whole_panels(scales).view(-1, PANEL, scales.shape[1]).transpose(1, 2).contiguous()


def _whole_panels(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % PANEL)).contiguous()


@dataclass(frozen=True)
class Layout:
    """How numbers [rows, blocks * block] and scales [rows, blocks] lie in a file."""

    numbers: Callable[[Tensor, Scheme], Tensor]
    scales: Callable[[Tensor], Tensor] = lambda scales: scales


LAYOUTS = {
    UNSIGNED: Layout(pack_unsigned),
    SIGNED: Layout(pack_signed),
    PANELS: Layout(pack_panels, scale_panels),
}


def _packed(numbers: Tensor, scheme: Scheme) -> Tensor:
    if scheme.bits == 8:
        return numbers.view(torch.uint8)
    pairs = numbers.view(torch.int16)  # the second number in the high byte
    return ((pairs & 0x0F) | ((pairs >> 4) & 0xF0)).to(torch.uint8)


def _in_blocks(rows: Tensor, scheme: Scheme) -> Tensor:
    """[rows, width] -> [rows, blocks, block], the last block filled up with zeros."""
    short = scheme.stored_width(rows.shape[1]) - rows.shape[1]
    padded = torch.nn.functional.pad(rows, (0, short)) if short else rows
    return padded.view(len(rows), -1, scheme.block or rows.shape[1])


def rounded(w: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """The whole numbers, in float32, that stand for ``w`` under ``scale``."""
    return (w * (1 / scale)).round_().clamp_(scheme.smallest, scheme.largest)


def _widest(w: Tensor, scheme: Scheme) -> Tensor:
    """Per block, the scale under which nothing is clipped."""
    if not scheme.signed_scales:
        return w.abs().amax(-1, keepdim=True) / scheme.largest
    return w.gather(-1, w.abs().argmax(-1, keepdim=True)) / scheme.smallest


def _not_zero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be read."""
    size = scale.abs().clamp(min=max(SMALLEST, torch.finfo(dtype).smallest_normal))
    return torch.where(scale < 0, -size, size).to(dtype).float()
