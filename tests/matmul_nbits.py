"""The meaning of ONNX Runtime's MatMulNBits in NumPy, with ``accuracy_level`` 4: inputs rounded to 8 bits in blocks.

From the operator's documentation, and the rounding of MLAS: a block's scale is its largest magnitude / 127.
"""

import numpy as np


def matmul_nbits(x, codes, scales, zeros, *, bits, block_size):
    """x float [..., K]; codes uint8 [N, blocks, block_size * bits / 8]; scales [N, blocks]; zeros uint8, packed, or None.

    Returns float64 [..., N].
    """
    numbers = unpacked(codes, bits)
    columns, blocks, _ = numbers.shape
    zeros = np.full((columns, blocks), 1 << bits - 1) if zeros is None else zero_points(zeros, bits, blocks)
    missing = blocks * block_size - x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    inputs = padded.reshape(*x.shape[:-1], blocks, block_size)
    input_scales = np.abs(inputs).max(-1, keepdims=True) / np.float32(127)
    rounded = np.rint(np.divide(inputs, input_scales, out=np.zeros_like(inputs), where=input_scales > 0))
    sums = np.einsum("...bk,nbk->...nb", rounded.astype(np.float64), numbers - zeros[..., None])
    return (sums * input_scales[..., None, :, 0] * scales.astype(np.float64)).sum(-1)


def unpacked(packed, bits):
    if bits == 8:
        return packed.astype(np.int64)
    halves = np.stack([packed & 15, packed >> 4], -1)
    return halves.reshape(*packed.shape[:-1], -1).astype(np.int64)


def zero_points(packed, bits, blocks):
    return unpacked(packed, bits)[:, :blocks]
