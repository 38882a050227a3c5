"""``glm4::BlockQuantizedMatMul``: y = x Wᵀ + bias in integers, for a W of 8- or 4-bit numbers under a scale per block.

Inputs: x float32 [..., width]; numbers uint8 [panels, blocks, block * 64 * bits / 8]; scales bfloat16, float16 or
float32 [panels, blocks, 64]; optionally bias float32 [columns]; optionally zeros int8 [panels, blocks, 64], each
block's zero point minus 2^(bits - 1). Attributes: columns, width, bits (8 or 4), block_size, and
gated (0 or 1). Output: float32 [..., columns]; gated, silu(first half of the columns) * second half.

The library for ONNX Runtime's CPU provider is built with the package; ``cpu/product.h`` describes its layout.
:func:`pack`, :func:`unpack_codes` and :func:`block_product` are the specification of the operator: tests compare the library
and the exporters' own packing with them.
"""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

OPERATOR = "BlockQuantizedMatMul"
PANEL = 64  # columns that are stored together
KERNELS = ("avx512-vnni", "avx-vnni", "avx2", "neon-i8mm", "neon-dotprod", "portable")  # the fastest first
VARIABLE = "GLM4_CPU_KERNELS"  # of the environment: the name of the kernels to use, instead of the fastest

Floats = npt.NDArray[np.float32]


def stored_shape(columns: int, width: int, bits: int, block: int) -> tuple[int, int, int]:
    """Shape of the numbers of a matrix [columns, width]; that of its scales ends in 64."""
    return -(-columns // PANEL), -(-width // block), block * PANEL * bits // 8


def pack(numbers: npt.NDArray[np.uint8], bits: int, block: int) -> npt.NDArray[np.uint8]:
    """Unsigned numbers [columns, blocks * block] -> panels; the last is padded with the code of 0."""
    columns, width = numbers.shape
    short = -columns % PANEL
    zero = np.uint8(1 << bits - 1)
    padded = np.concatenate([numbers, np.full((short, width), zero)]) if short else numbers
    groups = padded.reshape(-1, PANEL, width // block, block // 4, 4).transpose(0, 2, 3, 1, 4)
    if bits == 4:
        groups = groups[:, :, 0::2] | groups[:, :, 1::2] << 4
    return groups.reshape(len(groups), width // block, -1)


def unpack_codes(stored: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Panels -> numbers around zero [panels * 64, blocks * block]."""
    panels, blocks, _ = stored.shape
    groups = stored.reshape(panels, blocks, -1, 1, PANEL, 4)
    if bits == 4:
        groups = np.concatenate([groups & 0x0F, groups >> 4], axis=3)
    rows = groups.reshape(panels, blocks, -1, PANEL, 4).transpose(0, 3, 1, 2, 4)
    return rows.reshape(panels * PANEL, -1).astype(np.int32) - (1 << bits - 1)


def block_product(
    x: Floats,
    numbers: npt.NDArray[np.uint8],
    scales: Floats,
    bias: Floats | None = None,
    zeros: npt.NDArray[np.int8] | None = None,
    *,
    columns: int,
    bits: int,
    block_size: int,
    gated: bool = False,
) -> Floats:
    """The operator in NumPy and float64.

    A block of a row of x is rounded to round(x * 127 / largest |x|), ties to even, under the scale largest / 127.
    """
    width, stored = x.shape[-1], numbers.shape[1] * block_size
    rows = np.pad(x.reshape(-1, width), ((0, 0), (0, stored - width))).reshape(
        -1, numbers.shape[1], block_size
    )
    largest = np.abs(rows).max(-1, keepdims=True)
    inverse = np.divide(127, largest, out=np.zeros_like(largest), where=largest > 1e-30)
    rounded = np.rint(rows * inverse).astype(np.int64)
    weights = unpack_codes(numbers, bits).reshape(-1, numbers.shape[1], block_size)
    if zeros is not None:
        weights = weights - _by_column(zeros)[..., None]
    dots = np.einsum("mbk,nbk->mnb", rounded, weights).astype(np.float64)
    steps = largest[..., 0].astype(np.float64) / 127, _by_column(scales.astype(np.float64))
    y = np.einsum("mnb,mb,nb->mn", dots, *steps)[:, :columns]
    if bias is not None:
        y = y + bias
    if gated:
        gate, up = np.split(y, 2, axis=-1)
        y = gate / (1 + np.exp(-gate)) * up
    result: Floats = y.astype(np.float32).reshape(*x.shape[:-1], -1)
    return result


def _by_column(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[panels, blocks, 64] -> [panels * 64, blocks]."""
    return stored.transpose(0, 2, 1).reshape(-1, stored.shape[1])


def library() -> Path | None:
    """The operator's library for ONNX Runtime; None if it was not built with the package."""
    folder, suffixes = (
        Path(__file__).parent,
        reversed(EXTENSION_SUFFIXES),
    )  # the plain one first: see setup.py
    return next((path for s in suffixes if (path := folder / f"cpu_operators{s}").is_file()), None)


@cache
def supported_kernels() -> tuple[str, ...]:
    """The library's kernels that this processor supports, the fastest first; empty without a library."""
    path = library()
    if path is None:
        return ()
    has = ctypes.CDLL(str(path)).glm4_has_kernels
    has.argtypes = [ctypes.c_char_p]
    return tuple(name for name in KERNELS if has(name.encode()))


@cache
def kernels() -> str | None:
    """The kernels that target ``cpu`` uses in this process, one of :data:`KERNELS`; None without a library.

    Raises:
        ValueError: ``GLM4_CPU_KERNELS`` names kernels that this processor does not support.
    """
    path = library()
    if path is None:
        return None
    name = ctypes.CDLL(str(path)).glm4_kernels
    name.restype = ctypes.c_char_p
    found = name()
    if found is None:
        known = ", ".join(supported_kernels())
        raise ValueError(
            f"{VARIABLE} names kernels that this processor does not support; it supports {known}"
        )
    return str(found.decode())
