"""Element types by their names in manifests: ONNX's names in lower case, such as ``float16`` or ``int4``."""

import re

BFLOAT16 = 16  # ONNX's number of bfloat16, which NumPy does not have


def bits(name: str) -> int:
    """Bits of one element: 16 for ``bfloat16``, 8 for ``float8e4m3fn``, 4 for ``int4``."""
    found = re.search(r"\d+", name)
    assert found is not None
    return int(found[0])
