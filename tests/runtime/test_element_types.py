"""Bits of element types, from their names."""

import numpy as np
import pytest

from glm4_runtime.bundle.element_types import NUMPY_LACKS, TYPE_NAMES, bits


@pytest.mark.parametrize("name", ["float32", "float16", "int8", "uint8", "int32", "int64"])
def test_types_of_numpy(name):
    assert bits(name) == 8 * np.dtype(name).itemsize


@pytest.mark.parametrize(
    ("name", "expected"), [("bfloat16", 16), ("float8e4m3fn", 8), ("int4", 4), ("bool", 8)]
)
def test_types_that_numpy_does_not_have(name, expected):
    assert bits(name) == expected


def test_numbers_are_onnx_own():
    onnx = pytest.importorskip("onnx")
    numbers = {number: onnx.TensorProto.DataType.Name(number).lower() for number in TYPE_NAMES}
    assert numbers == TYPE_NAMES | {1: "float"}
    assert {TYPE_NAMES[number]: number for number in NUMPY_LACKS.values()} == NUMPY_LACKS
