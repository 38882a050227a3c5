"""The table of stored formats; each is one object. Needs no torch.

A new format is a class in a file of this package and a row here. The object knows its parts, encodes and
decodes rows, and says how products round their inputs. Code elsewhere asks the object and never compares names.
"""

from collections.abc import Mapping

from glm4_exporters.formats.base import (
    CODES,
    INT8_MAX,
    SCALES,
    Encoded,
    Format,
    InputRounding,
    Part,
    StoredFormat,
)
from glm4_exporters.formats.float8 import Float8
from glm4_exporters.formats.integers import Integers
from glm4_exporters.formats.mxfp8 import Mxfp8
from glm4_exporters.formats.nvfp4 import INPUTS as NVFP4_INPUTS
from glm4_exporters.formats.nvfp4 import Nvfp4
from glm4_runtime.errors import ExportError

_INT8_INPUTS = InputRounding("int8", INT8_MAX, searched=True)

# A search lowers the error of int4 by clipping. It cannot lower the rounding error of int8.
FORMATS: Mapping[str, Format] = {
    "int8": Integers(bits=8, block=128, ranges=(1.0,)),
    "int8-channel": Integers(bits=8, block=None, ranges=(1.0, 0.9)),
    "int8-sq": Integers(bits=8, block=None, ranges=(1.0, 0.9), inputs=_INT8_INPUTS),
    "int4": Integers(bits=4, block=32, ranges=(0.95, 0.8)),
    "int4-fine": Integers(bits=4, block=16, ranges=(0.95, 0.8)),
    "int4-wide": Integers(bits=4, block=64, ranges=(0.95, 0.8)),
    "int4-signed": Integers(bits=4, block=32, ranges=(1.0, 0.85), signed_scales=True),
    "int4-fine-signed": Integers(bits=4, block=16, ranges=(1.0, 0.85), signed_scales=True),
    "int4-wide-signed": Integers(bits=4, block=64, ranges=(1.0, 0.85), signed_scales=True),
    "fp8": Float8(),
    "nvfp4": Nvfp4(),
    "nvfp4-w4a4": Nvfp4(inputs=NVFP4_INPUTS),
    "mxfp8": Mxfp8(),
}


def require_format(name: str) -> Format:
    """The row of the table.

    Raises:
        ExportError: an unknown name; lists the known ones.
    """
    if name not in FORMATS:
        raise ExportError(f"unknown format {name!r}; the formats are {', '.join(FORMATS)}")
    return FORMATS[name]


__all__ = [
    "CODES",
    "FORMATS",
    "SCALES",
    "Encoded",
    "Float8",
    "Format",
    "InputRounding",
    "Integers",
    "Part",
    "StoredFormat",
    "require_format",
]
