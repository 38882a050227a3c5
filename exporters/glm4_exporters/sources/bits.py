"""Integers of 4 and 8 bits that lie several in an int32."""

import torch
from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in an int32 of each of eight columns
ONES = {4: 0x11111111, 8: 0x01010101}  # 1 at every place


def unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, words * 32 / bits], the lowest bits first.

    Args:
        order: the place in an int32 of each of its numbers; one after the other where None.
    """
    data = words.contiguous().view(torch.uint8)  # little-endian
    if bits == 4:
        data = torch.stack((data & 15, data >> 4), -1).flatten(-2)
    if order is None:
        return data
    return data.view(len(words), -1, len(order))[..., list(order)].flatten(1)


def around_zero(numbers: Tensor, bits: int) -> Tensor:
    """Unsigned numbers -> int8, less half of their range."""
    return (numbers.to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def plus_one(words: Tensor, bits: int) -> Tensor:
    """1 added to every number of an int32; a carry goes into the number above, as the writers' borrow came from it."""
    return ((words.to(torch.int64) + ONES[bits]) & 0xFFFFFFFF).to(torch.int32)
