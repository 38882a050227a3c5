"""Rows of a matrix to integers and scales, and back."""

import torch
from torch import Tensor

from glm4_exporters.quantize.schemes import Scheme

SMALLEST = 2.0**-100  # a scale; a block of zeros has one too, since it must be positive


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
    absmax = w.abs().amax(-1, keepdim=True)
    scale = best = None
    for share in scheme.ranges:
        q = _rounded(w, _positive(absmax * (share / scheme.largest), torch.float32), scheme)
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
    scale = _positive(torch.where(scale > 0, scale, absmax / scheme.largest), scale_type)
    numbers = _rounded(w, scale, scheme)
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


def _rounded(w: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    return (w * (1 / scale)).round_().clamp_(scheme.smallest, scheme.largest)


def _positive(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be read, and never zero."""
    return scale.clamp(min=max(SMALLEST, torch.finfo(dtype).smallest_normal)).to(dtype).float()
