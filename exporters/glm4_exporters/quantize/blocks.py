"""Rows of a matrix to integers and scales, and back."""

import torch
from torch import Tensor

from glm4_exporters.quantize.schemes import Scheme

SMALLEST = 2.0**-100  # a scale; a block of zeros has one too, since it must be positive


def quantize(
    weight: Tensor, scheme: Scheme, scale_type: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Numbers and scales that lie closest to ``weight``.

    For every range that the scheme tries, the numbers are rounded, the scale is refitted to them by least
    squares, sum(w q) / sum(q q), rounded to ``scale_type``, and the numbers are rounded again under it.

    Args:
        weight: float32 [rows, width].
        scale_type: what scales are stored as.
        importance: float32 [width], how much the square of an input's error counts: the mean of its x^2.

    Returns:
        int8 [rows, blocks * block], zero past the width, and ``scale_type`` [rows, blocks].
    """
    blocks = scheme.blocks(weight.shape[1])
    w = _in_blocks(weight, scheme)
    counts = None if importance is None else _in_blocks(importance[None], scheme)
    absmax = w.abs().amax(-1, keepdim=True)
    best = best_error = None
    for share in scheme.ranges:
        scale = _stored(absmax * (share / scheme.largest), scale_type)
        q = _rounded(w, scale, scheme)
        weighted = q if counts is None else q * counts
        fitted = (w * weighted).sum(-1, keepdim=True) / (q * weighted).sum(-1, keepdim=True)
        scale = _stored(torch.where(fitted > 0, fitted, scale), scale_type)
        q = _rounded(w, scale, scheme)
        if len(scheme.ranges) == 1:
            best = q, scale
            break
        error = torch.addcmul(w, q, scale, value=-1).square_()
        if counts is not None:
            error *= counts
        error = error.sum(-1, keepdim=True)
        if best is None or best_error is None:
            best, best_error = (q, scale), error
        else:
            better = error < best_error
            best = torch.where(better, q, best[0]), torch.where(better, scale, best[1])
            best_error = torch.minimum(error, best_error)
    assert best is not None
    q, scale = best
    return q.to(torch.int8).flatten(1), scale.view(-1, blocks).to(scale_type)


def dequantize(numbers: Tensor, scales: Tensor, scheme: Scheme, width: int) -> Tensor:
    """float32 [rows, width] that numbers [rows, blocks * block] and scales [rows, blocks] stand for."""
    return (_in_blocks(numbers.float(), scheme) * scales.float()[..., None]).flatten(1)[:, :width]


def pack_unsigned(numbers: Tensor, scheme: Scheme) -> Tensor:
    """uint8 [rows, blocks * block * bits / 8], with the scheme's zero in the middle."""
    return _packed(numbers.view(torch.uint8) ^ 0x80 if scheme.bits == 8 else numbers + scheme.zero, scheme)


def pack_signed(numbers: Tensor, scheme: Scheme) -> Tensor:
    """The same bytes in two's complement, as uint8."""
    return _packed(numbers.view(torch.uint8) if scheme.bits == 8 else numbers & 0xF, scheme)


def _packed(numbers: Tensor, scheme: Scheme) -> Tensor:
    bytes_: Tensor = numbers.view(torch.uint8)
    if scheme.bits == 4:
        bytes_ = torch.bitwise_or(bytes_[:, 0::2], bytes_[:, 1::2] << 4)
    return bytes_


def _in_blocks(rows: Tensor, scheme: Scheme) -> Tensor:
    """[rows, width] -> [rows, blocks, block], the last block filled up with zeros."""
    short = scheme.stored_width(rows.shape[1]) - rows.shape[1]
    padded = torch.nn.functional.pad(rows, (0, short)) if short else rows
    return padded.view(len(rows), -1, scheme.block or rows.shape[1])


def _rounded(w: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    return (w * (1 / scale)).round_().clamp_(-scheme.largest, scheme.largest)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be read, positive."""
    return scale.clamp(min=max(SMALLEST, torch.finfo(dtype).smallest_normal)).to(dtype).float()
