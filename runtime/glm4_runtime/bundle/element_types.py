"""The element types of our graphs, by ONNX's names in lower case, such as ``float16`` or ``int4``."""

import re
from dataclasses import dataclass

# By ONNX's number, TensorProto.DataType.
TYPE_NAMES = {
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16",
    17: "float8e4m3fn", 21: "uint4", 22: "int4",
}  # fmt: skip
# Types that NumPy does not have, by name.
NUMPY_LACKS = {"bfloat16": 16, "float8e4m3fn": 17}


@dataclass(frozen=True)
class CacheType:
    """How a KV cache stores the keys or values of one position and head.

    Attributes:
        short: its name in options and gates.
        element: element type of the arrays.
        scale_bytes: bytes of the scale after the numbers of each row; 0: the scales are in the graph, or there are none.
        quantized: whether the numbers need scales.
        calibrated: whether the scales are fixed, and found on a text.
    """

    short: str
    element: str
    scale_bytes: int = 0
    quantized: bool = False
    calibrated: bool = False

    def row(self, head_dim: int) -> int:
        """Elements of one row."""
        return head_dim + self.scale_bytes

    @property
    def numpy(self) -> str:
        """NumPy's type for copies of rows. Integers of the same size stand for types that NumPy does not have."""
        return f"uint{bits(self.element)}" if self.element in NUMPY_LACKS else self.element

    def row_bytes(self, head_dim: int) -> int:
        return self.row(head_dim) * bits(self.element) // 8


# By the name in a manifest. ``int8-rows`` is target cpu's: a row of one head ends with its own float32 scale.
CACHE_TYPES = {
    "float32": CacheType("fp32", "float32"),
    "float16": CacheType("fp16", "float16"),
    "bfloat16": CacheType("bf16", "bfloat16"),
    "int8": CacheType("int8", "int8", quantized=True, calibrated=True),
    "int8-rows": CacheType("int8", "int8", scale_bytes=4, quantized=True),
    "float8e4m3fn": CacheType("fp8", "float8e4m3fn", quantized=True, calibrated=True),
}
# Names of quantized caches, with their short names.
QUANTIZED_CACHES = {name: each.short for name, each in CACHE_TYPES.items() if each.quantized}
CALIBRATED_CACHES = tuple(name for name, each in CACHE_TYPES.items() if each.calibrated)


def bits(name: str) -> int:
    """Bits of one element: 16 for ``bfloat16``, 8 for ``float8e4m3fn`` and ``bool``, 4 for ``int4``."""
    digits = re.search(r"\d+", name)
    return int(digits[0]) if digits else 8
