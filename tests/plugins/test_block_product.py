"""The integer product: every set of kernels against the NumPy meaning, and against each other bit by bit."""

import ctypes
import os
import subprocess
import sys

import ml_dtypes  # noqa: F401  NumPy learns bfloat16 from it
import numpy as np
import pytest
import torch
from cpu_operators import KERNELS, needs_cpu_operators

from glm4_exporters.formats import CODES, FORMATS, SCALES
from glm4_exporters.formats.arrangements import pack_panels, scale_panels
from glm4_plugins import block_product as block_product_module
from glm4_plugins.block_product import (
    block_product,
    kernels,
    library,
    pack,
    stored_shape,
    supported_kernels,
    unpack_codes,
)

pytestmark = needs_cpu_operators

SCALE_TYPES = ("bfloat16", "float16", "float32")
ONNX_TYPES = {"bfloat16": 16, "float16": 10, "float32": 1, "float64": 11}


@pytest.fixture(scope="module")
def product():
    function = ctypes.CDLL(str(library())).glm4_product
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_char_p, pointer, integer, pointer, pointer, ctypes.c_int, pointer, pointer]
    function.argtypes += [integer, integer] + [ctypes.c_int] * 3 + [pointer]

    def run(name, x, matrix, bias=None, gated=False):
        y = np.full((len(x), matrix.columns >> gated), np.nan, np.float32)
        arrays = [x, matrix.numbers, matrix.scales, matrix.zeros, bias, y]
        x_at, numbers, scales, *optional, out = (None if a is None else a.ctypes.data for a in arrays)
        sizes = matrix.columns, x.shape[1], matrix.bits, matrix.block, int(gated)
        kind = ONNX_TYPES[matrix.scales.dtype.name]
        code = function(name and name.encode(), x_at, len(x), numbers, scales, kind, *optional, *sizes, out)
        return code if code else y

    return run


class Matrix:
    """Random numbers and scales, as they are stored."""

    def __init__(self, columns, width, bits, block, seed=0, scales="bfloat16", zeros=False):
        rng = np.random.default_rng(seed)
        self.columns, self.bits, self.block = columns, bits, block
        shape = stored_shape(columns, width, bits, block)
        numbers = rng.integers(0, 1 << bits, (columns, shape[1] * block), np.uint8)
        numbers[:, width:] = 1 << bits - 1
        self.numbers = np.ascontiguousarray(pack(numbers, bits, block))
        by_block = (*shape[:2], 64)
        self.scales = (rng.standard_normal(by_block) * 0.02).astype(scales)
        half = 1 << bits - 1
        self.zeros = rng.integers(-half, half, by_block, np.int8) if zeros else None

    def meaning(self, x, **options):
        return block_product(
            x,
            self.numbers,
            self.scales.astype(np.float32),
            zeros=self.zeros,
            columns=self.columns,
            bits=self.bits,
            block_size=self.block,
            **options,
        )


SHAPES = [
    (64, 128, 8, 128, 1),
    (128, 256, 8, 128, 7),
    (192, 200, 8, 128, 49),  # a short block, and a group of rows and one more
    (70, 96, 8, 32, 6),  # a panel of six columns
    (1, 8, 8, 8, 5),
    (64, 64, 4, 32, 1),
    (320, 328, 4, 64, 13),
    (130, 48, 4, 16, 97),
    (64, 1024, 4, 128, 50),
    (64, 1024, 8, 1024, 3),
]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("columns", "width", "bits", "block", "rows"), SHAPES)
def test_kernels_compute_what_the_operator_means(product, name, columns, width, bits, block, rows):
    rng = np.random.default_rng(rows)
    matrix = Matrix(columns, width, bits, block)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    bias = rng.standard_normal(columns).astype(np.float32)
    expected = matrix.meaning(x, bias=bias)
    np.testing.assert_allclose(product(name, x, matrix, bias), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_gated(product, name):
    matrix = Matrix(384, 256, 8, 128)
    x = np.random.default_rng(1).standard_normal((50, 256)).astype(np.float32) * 3
    expected = matrix.meaning(x, gated=True)
    assert expected.shape == (50, 192)
    np.testing.assert_allclose(product(name, x, matrix, gated=True), expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize(("columns", "width", "bits", "block", "rows"), SHAPES)
def test_kernels_agree_bit_by_bit_and_so_do_rows_alone(product, columns, width, bits, block, rows):
    matrix = Matrix(columns, width, bits, block)
    x = np.random.default_rng(rows).standard_normal((rows, width)).astype(np.float32)
    together = product("portable", x, matrix)
    for name in KERNELS:
        np.testing.assert_array_equal(product(name, x, matrix), together)
        alone = np.concatenate([product(name, x[i : i + 1], matrix) for i in range(0, rows, 5)])
        np.testing.assert_array_equal(alone, together[::5])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", range(1, 20))
def test_every_number_of_rows(product, bits, rows):
    """One, two and three tiles, of as many rows or of one row more than the last."""
    matrix = Matrix(64, 256, bits, 128)
    x = np.random.default_rng(rows).standard_normal((rows, 256)).astype(np.float32)
    together = product("portable", x, matrix)
    for name in KERNELS:
        np.testing.assert_array_equal(product(name, x, matrix), together)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scales", SCALE_TYPES)
@pytest.mark.parametrize(("columns", "width", "bits", "block", "rows"), SHAPES[1:])
def test_zero_points_and_every_type_of_scales(product, columns, width, bits, block, rows, scales, zeros):
    matrix = Matrix(columns, width, bits, block, scales=scales, zeros=zeros)
    rng = np.random.default_rng(rows)
    x, bias = (rng.standard_normal(size).astype(np.float32) for size in ((rows, width), columns))
    together = product("portable", x, matrix, bias)
    np.testing.assert_allclose(together, matrix.meaning(x, bias=bias), rtol=2e-5, atol=1e-4)
    for name in KERNELS:
        np.testing.assert_array_equal(product(name, x, matrix, bias), together)
        np.testing.assert_array_equal(product(name, x[3:4], matrix, bias), together[3:4])


def test_random_shapes_with_zero_points(product):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        columns, width, rows = (int(rng.integers(1, most)) for most in (200, 400, 60))
        bits, block = int(rng.choice([4, 8])), 8 * int(rng.integers(1, 33))
        matrix = Matrix(columns, width, bits, block, seed, str(rng.choice(SCALE_TYPES)), zeros=True)
        x = rng.standard_normal((rows, width)).astype(np.float32)
        together = product("portable", x, matrix)
        np.testing.assert_allclose(together, matrix.meaning(x), rtol=2e-5, atol=1e-4, err_msg=str(seed))
        for name in KERNELS:
            np.testing.assert_array_equal(product(name, x, matrix), together, err_msg=str(seed))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_extremes_of_numbers_and_zero_points_are_exact(product, name, bits, sign):
    """The largest sums of a block: 1024 products of 127 and of the largest distance from the zero point."""
    matrix = Matrix(64, 1024, bits, 1024, scales="float32", zeros=True)
    most = (1 << bits) - 1
    matrix.numbers[:] = 0xFF if sign > 0 else 0
    matrix.zeros[:] = -(1 << bits - 1) if sign > 0 else (1 << bits - 1) - 1
    matrix.scales[:] = 1
    x = np.full((1, 1024), 127, np.float32)
    assert (product(name, x, matrix) == sign * 1024 * 127 * most).all()


EXTREMES = {8: (0, 1, 127, 128, 129, 254, 255), 4: (0, 1, 7, 8, 9, 15)}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [8, 24, 32, 40, 128, 1024])
def test_extreme_numbers_are_exact(product, name, bits, block):
    """Numbers at the ends of the range against inputs of 127 and -127: sums that do not fit 16 bits must not
    saturate."""
    rng = np.random.default_rng(block)
    columns, rows, blocks = 64 * 3, 13, 2
    matrix = Matrix(columns, blocks * block, bits, block, scales="float32")
    matrix.scales[:] = 1
    numbers = rng.choice(np.array(EXTREMES[bits], np.uint8), (columns, blocks * block))
    numbers[0::64] = (1 << bits) - 1  # whole columns of one extreme
    numbers[1::64] = 0
    matrix.numbers = np.ascontiguousarray(pack(numbers, bits, block))
    x = rng.choice(np.array([-127, 127, 126, -126, 0], np.float32), (rows, blocks * block))
    x[0], x[1] = 127, -127
    x[:, ::block] = 127  # the scale of every block of x is 1
    expected = x.astype(np.int64) @ (numbers.astype(np.int64) - (1 << bits - 1)).T
    np.testing.assert_array_equal(product(name, x, matrix), expected.astype(np.float32))


@pytest.mark.parametrize("name", KERNELS)
def test_every_float16_scale_is_read_exactly(product, name):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    matrix = Matrix(1 << 16, 8, 8, 8, scales="float16")
    matrix.scales[:] = halves.reshape(matrix.scales.shape)
    matrix.numbers[:] = 128
    matrix.numbers.reshape(-1, 2, 64, 4)[:, 0, :, 0] = 129  # 1 for the first input, 0 for the others
    x = np.full((1, 8), 127, np.float32)
    with np.errstate(invalid="ignore"):
        expected = halves.astype(np.float32) * 127
    np.testing.assert_array_equal(product(name, x, matrix)[0], expected)


def test_gates_agree_bit_by_bit(product):
    matrix = Matrix(384, 256, 4, 32)
    x = np.random.default_rng(1).standard_normal((50, 256)).astype(np.float32) * 3
    together = product("portable", x, matrix, gated=True)
    for name in KERNELS:
        np.testing.assert_array_equal(product(name, x, matrix, gated=True), together)
        np.testing.assert_array_equal(product(name, x[7:8], matrix, gated=True), together[7:8])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(product, name, bad):
    matrix = Matrix(64, 256, 8, 128)
    x = np.ones((3, 256), np.float32)
    x[1, 200] = bad
    y = product(name, x, matrix)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("name", KERNELS)
def test_zeros_and_the_smallest_numbers(product, name):
    matrix = Matrix(64, 128, 4, 32)
    x = np.zeros((2, 128), np.float32)
    x[1] = 1e-42  # 127 over it is infinite
    assert (product(name, x, matrix) == 0).all()


def test_impossible_products_are_refused(product):
    x = np.zeros((1, 128), np.float32)
    wrong_scales = {"scales": np.zeros((1, 1, 64), np.float64)}
    for wrong in (wrong_scales, {"bits": 5}, {"block": 12}, {"block": 2048}, {"columns": 0}):
        matrix = Matrix(64, 128, 8, 128)
        vars(matrix).update(wrong)
        assert product(None, x, matrix) == 2, wrong
    assert product(None, x, Matrix(64, 128, 8, 128), gated=True) == 2  # half a panel has no second half


def test_this_processor_runs_the_kernels_it_is_said_to(product):
    assert kernels() == supported_kernels()[0]
    assert supported_kernels()[-1] == "portable"
    for name in ("no-such-kernels", *(set(block_product_module.KERNELS) - set(KERNELS))):
        assert product(name, np.zeros((1, 128), np.float32), Matrix(64, 128, 8, 128)) == 1


def in_another_process(code, kernels):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"GLM4_CPU_KERNELS": kernels},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", KERNELS)
def test_the_environment_chooses_the_kernels(name):
    asked = in_another_process("from glm4_plugins.block_product import kernels; print(kernels())", name)
    assert asked.stdout == f"{name}\n", asked.stderr


def test_kernels_that_the_processor_does_not_support_are_refused():
    asked = in_another_process("from glm4_plugins.block_product import kernels; print(kernels())", "sse9")
    assert "GLM4_CPU_KERNELS" in asked.stderr
    assert KERNELS[0] in asked.stderr
    code = (
        "import onnxruntime; from glm4_plugins.block_product import library\n"
        "onnxruntime.SessionOptions().register_custom_ops_library(str(library()))"
    )
    refused = in_another_process(code, "sse9")
    assert refused.returncode
    assert "GLM4_CPU_KERNELS names kernels that this processor does not support" in refused.stderr
    assert in_another_process(code, KERNELS[-1]).returncode == 0


@pytest.mark.parametrize("name", ["int8", "int4", "int4-wide-signed"])
@pytest.mark.parametrize("rows", [64, 70, 1])
def test_the_writer_packs_as_the_operator_reads(name, rows):
    form = FORMATS[name]
    weight = torch.from_numpy(np.random.default_rng(rows).standard_normal((rows, 200)).astype(np.float32))
    parts = form.encode(weight, torch.bfloat16)
    numbers, scales = parts[CODES], parts[SCALES]
    unsigned = (numbers.numpy().astype(np.int16) + form.zero).astype(np.uint8)
    packed = pack_panels(numbers, form).numpy()
    np.testing.assert_array_equal(packed, pack(unsigned, form.bits, form.block))
    np.testing.assert_array_equal(unpack_codes(packed, form.bits)[:rows], numbers.numpy())
    assert not unpack_codes(packed, form.bits)[rows:].any()
    panels = scale_panels(scales)
    assert panels.shape == (*packed.shape[:2], 64)
    assert torch.equal(panels.transpose(1, 2).flatten(0, 1)[:rows], scales)
