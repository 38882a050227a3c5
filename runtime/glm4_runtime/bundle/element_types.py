"""The element types of our graphs, by ONNX's names in lower case, such as ``float16`` or ``int4``."""

import re

# By ONNX's number, TensorProto.DataType.
TYPE_NAMES = {
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16",
    17: "float8e4m3fn", 21: "uint4", 22: "int4",
}  # fmt: skip
# Types that NumPy does not have, by name.
NUMPY_LACKS = {"bfloat16": 16, "float8e4m3fn": 17}
# Types of a quantized KV cache, by name, with their short names in options and gates.
QUANTIZED_CACHES = {"int8": "int8", "float8e4m3fn": "fp8"}


def bits(name: str) -> int:
    """Bits of one element: 16 for ``bfloat16``, 8 for ``float8e4m3fn`` and ``bool``, 4 for ``int4``."""
    digits = re.search(r"\d+", name)
    return int(digits[0]) if digits else 8
