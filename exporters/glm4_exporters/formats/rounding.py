"""Rows of a matrix to integers and scales, and back."""

import torch
from torch import Tensor

from glm4_exporters.formats.integers import Integers

SMALLEST = 2.0**-100  # size of a scale; a block of zeros has one too


def quantize(
    weight: Tensor, form: Integers, scale_type: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales with the least squared error against ``weight``.

    For given codes q the best scale is sum(w q) / sum(q q). Its squared error is sum(w w) - sum(w q)^2 / sum(q
    q). So the range with the largest last term wins. Its scale is rounded to ``scale_type``, and the codes are
    rounded again with this scale.

    Args:
        weight: float32 [rows, width].
        scale_type: the type in which scales are stored.
        importance: float32 [width], the weight of each input's squared error: the mean of x^2.

    Returns:
        int8 [rows, blocks * block], zero past the width, and ``scale_type`` [rows, blocks].
    """
    w = _in_blocks(weight, form)
    counted = w if importance is None else w * _in_blocks(importance[None], form)
    widest = _widest(w, form)
    scale = best = None
    for share in form.ranges:
        q = rounded(w, _not_zero(widest * share, torch.float32), form)
        along = (counted * q).sum(-1, keepdim=True)
        size = (q if importance is None else q * _in_blocks(importance[None], form)).mul(q)
        fitted = along / size.sum(-1, keepdim=True)
        removed = along * fitted
        if scale is None or best is None:
            scale, best = fitted, removed
        else:
            scale = torch.where(removed > best, fitted, scale)
            best = torch.maximum(removed, best)
    assert scale is not None
    scale = _not_zero(torch.where(scale.abs() > 0, scale, widest), scale_type)
    numbers = rounded(w, scale, form)
    return numbers.to(torch.int8).flatten(1), scale[..., 0].to(scale_type)


def dequantize(numbers: Tensor, scales: Tensor, form: Integers, width: int) -> Tensor:
    """Codes [rows, blocks * block] times scales [rows, blocks], as float32 [rows, width]."""
    return (_in_blocks(numbers.float(), form) * scales.float()[..., None]).flatten(1)[:, :width]


def _in_blocks(rows: Tensor, form: Integers) -> Tensor:
    """[rows, width] -> [rows, blocks, block], padded with zeros."""
    short = form.stored_width(rows.shape[1]) - rows.shape[1]
    padded = torch.nn.functional.pad(rows, (0, short)) if short else rows
    return padded.view(len(rows), -1, form.block or rows.shape[1])


def rounded(w: Tensor, scale: Tensor, form: Integers) -> Tensor:
    """Round ``w / scale`` to codes, as float32."""
    return form.nearest(w * (1 / scale))


def _widest(w: Tensor, form: Integers) -> Tensor:
    """Per block, the smallest scale that clips nothing."""
    if not form.signed_scales:
        return w.abs().amax(-1, keepdim=True) / form.largest
    return w.gather(-1, w.abs().argmax(-1, keepdim=True)) / form.smallest


def _not_zero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as stored in ``dtype``, and never 0."""
    size = scale.abs().clamp(min=max(SMALLEST, torch.finfo(dtype).smallest_normal))
    return torch.where(scale < 0, -size, size).to(dtype).float()
