"""The product of LoRA adapters: every set of kernels against the NumPy meaning, and against each other bit by bit."""

import ctypes

import numpy as np
import pytest
from cpu_operators import KERNELS, needs_cpu_operators

from glm4_plugins.block_product import library
from glm4_plugins.lora_product import lora_product

pytestmark = needs_cpu_operators


@pytest.fixture(scope="module")
def product():
    function = ctypes.CDLL(str(library())).glm4_lora
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [
        ctypes.c_char_p,
        pointer,
        pointer,
        integer,
        integer,
        integer,
        pointer,
        pointer,
        integer,
    ]
    function.argtypes += [ctypes.c_int, pointer]

    def run(name, x, y, entries, elements, gated=False):
        out = np.full((len(x), y.shape[1] >> gated), np.nan, np.float32)
        table = None if entries is None else np.array(entries, np.int64)
        at = [None if array is None else array.ctypes.data for array in (table, elements)]
        sizes = len(x), x.shape[1], y.shape[1]
        count = 0 if elements is None else elements.size
        arrays = x.ctypes.data, y.ctypes.data
        code = function(name and name.encode(), *arrays, *sizes, *at, count, int(gated), out.ctypes.data)
        return code if code else out

    return run


def random_adapter(inputs, outputs, ranks, seed=0):
    """Two parts, or one that covers all columns."""
    rng = np.random.default_rng(seed)
    panels = -(-outputs // 64)
    covered = [(0, panels)] if len(ranks) == 1 else [(0, panels // 2), (panels // 2, panels - panels // 2)]
    entries, parts, at = [[0] * 5, [0] * 5], [], 0
    for i, (rank, (first, count)) in enumerate(zip(ranks, covered, strict=True)):
        entries[i] = [rank, at, at + inputs * rank, first, count]
        parts += [rng.standard_normal(inputs * rank) * 0.1, rng.standard_normal(count * rank * 64) * 0.1]
        at += inputs * rank + count * rank * 64
    return entries, np.concatenate(parts).astype(np.float16)


def values(rows, columns, seed):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


CASES = [  # inputs, outputs, ranks, rows
    (64, 64, [16], 1),
    (48, 70, [1], 3),
    (1027, 130, [5], 9),  # a chunk and three inputs
    (4096, 256, [16], 8),
    (2050, 128, [64], 5),
    (100, 256, [8, 24], 7),
    (33, 384, [17, 3], 4),
    (3, 1, [2], 2),
]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("inputs", "outputs", "ranks", "rows"), CASES)
def test_kernels_compute_what_the_operator_means(product, name, inputs, outputs, ranks, rows):
    entries, elements = random_adapter(inputs, outputs, ranks)
    x, y = values(rows, inputs, 1), values(rows, outputs, 2)
    expected = lora_product(x, y, entries, elements)
    np.testing.assert_allclose(product(name, x, y, entries, elements), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "ranks", "rows"), [case for case in CASES if case[1] % 128 == 0]
)
def test_kernels_agree_bit_by_bit_and_so_do_rows_alone(product, inputs, outputs, ranks, rows, gated):
    entries, elements = random_adapter(inputs, outputs, ranks)
    x, y = values(rows, inputs, 3), values(rows, outputs, 4)
    together = product("portable", x, y, entries, elements, gated)
    np.testing.assert_allclose(
        together, lora_product(x, y, entries, elements, gated=gated), rtol=2e-5, atol=5e-5
    )
    for name in KERNELS:
        np.testing.assert_array_equal(product(name, x, y, entries, elements, gated), together)
        alone = [product(name, x[i : i + 1], y[i : i + 1], entries, elements, gated) for i in range(rows)]
        np.testing.assert_array_equal(np.concatenate(alone), together)


@pytest.mark.parametrize("name", KERNELS)
def test_rows_without_an_adapter_stay_as_they_are(product, name):
    x, y = values(6, 40, 5), values(6, 200, 6)
    np.testing.assert_array_equal(product(name, x, y, None, None), y)


@pytest.mark.parametrize("name", KERNELS)
def test_every_float16_is_read_exactly(product, name):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    elements = np.concatenate([[1], halves, np.zeros(-halves.size % 64)]).astype(np.float16)
    panels = -(-halves.size // 64)
    entries = [[1, 0, 1, 0, panels], [0] * 5]
    y = np.zeros((1, halves.size), np.float32)
    found = product(name, np.ones((1, 1), np.float32), y, entries, elements)
    np.testing.assert_array_equal(found[0], halves.astype(np.float32))


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_not_finite_stays_in_its_row(product, name):
    entries, elements = random_adapter(64, 128, [4])
    x, y = values(4, 64, 7), values(4, 128, 8)
    x[2, 5] = np.inf
    found = product(name, x, y, entries, elements)
    assert not np.isfinite(found[2]).any()
    assert np.isfinite(found[[0, 1, 3]]).all()


def test_entries_outside_the_adapter_are_refused(product):
    entries, elements = random_adapter(64, 128, [4])
    x, y = values(1, 64, 7), values(1, 128, 8)
    assert isinstance(product(None, x, y, entries, elements), np.ndarray)
    huge = 2**62
    for place, value in (
        (0, -1),
        (0, huge),
        (1, -1),
        (1, 2**63 - 1),
        (2, 0),
        (2, huge),
        (3, -1),
        (3, 2),
        (4, 0),
        (4, 3),
        (4, huge),
    ):
        wrong = [list(entries[0]), entries[1]]
        wrong[0][place] = value
        assert product(None, x, y, wrong, elements) == 2, (place, value)
    assert product(None, x, y, entries, elements[:-1]) == 2
