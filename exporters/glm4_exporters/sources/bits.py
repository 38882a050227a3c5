"""Unpacks 4-bit and 8-bit integers from int32 words."""

import torch
from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # position in an int32 of each of eight columns
ONES = {4: 0x11111111, 8: 0x01010101}  # a 1 at every position


def unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, words * 32 / bits], the lowest bits first.

    Args:
        order: position in an int32 of each number. None: ascending order.
    """
    # A copy: torch calls a transposed [n, 1] contiguous, but does not view its numbers as bytes.
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # little-endian
    if bits == 4:
        data = torch.stack((data & 15, data >> 4), -1).flatten(-2)
    if order is None:
        return data
    return data.view(len(words), -1, len(order))[..., list(order)].flatten(1)


def around_zero(numbers: Tensor, bits: int) -> Tensor:
    """Convert unsigned numbers to int8 and subtract half of their range, 2^(bits - 1)."""
    return (numbers.to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def plus_one(words: Tensor, bits: int) -> Tensor:
    """Add 1 to every number of an int32. A carry goes into the next number: it undoes the borrow of the writer."""
    return ((words.to(torch.int64) + ONES[bits]) & 0xFFFFFFFF).to(torch.int32)
