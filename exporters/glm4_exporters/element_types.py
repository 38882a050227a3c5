"""Names of element types (ONNX's, in lower case), and the types of onnx_ir and torch."""

import onnx_ir as ir
import torch

TORCH_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8e4m3fn": torch.float8_e4m3fn,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


def ir_type(name: str) -> ir.DataType:
    """onnx_ir's element type of this name."""
    return ir.DataType["FLOAT" if name == "float32" else name.upper()]


def type_name(dtype: ir.DataType) -> str:
    """The name of onnx_ir's element type."""
    return "float32" if dtype == ir.DataType.FLOAT else dtype.name.lower()
