"""Give TensorRT's parser NVFP4 weights as 4-bit floats; the bundle's graph has twice the floats as int8.

    int8 [out, in]    -> DequantizeLinear(block 16, float8 scales * s)
    float4 [out, in]  -> DequantizeLinear(block 16, float8 scales * 2s)

If s is float32 and the weight 16-bit, the graph casts the weight. TensorRT-RTX 1.7 has no product of that form, so the
parser gets scales that are rounded to 16 bits in place of the cast.

ONNX Runtime 1.32 has no CPU kernel for 4-bit floats, and TensorRT-RTX 1.7 multiplies by them. The new data exist when
they are written (:mod:`glm4_exporters.engine.graph_file`).
"""

import numpy as np
import onnx_ir as ir

from glm4_exporters.formats.nvfp4 import BLOCK
from glm4_exporters.passes.derived import Array, derived, drop_unused

_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)  # twice the 4-bit floats 0 ... 7; the fourth bit is the sign
CODE_OF = np.zeros(256, np.uint8)  # by the byte of an int8 number
CODE_OF[list(_DOUBLED)] = range(8)
CODE_OF[[256 - number for number in _DOUBLED[1:]]] = range(9, 16)


class Fp4Weights(ir.passes.InPlacePass):
    """Replace NVFP4's int8 codes by 4-bit floats, and double the matrix's scale. Runs after ``SplitProducts``."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if _is_nvfp4(node)]
        for node in found:
            codes, scales = node.inputs
            assert codes is not None
            assert scales is not None
            inner = scales.producer()
            assert inner is not None
            total = inner.inputs[1]
            assert total is not None
            assert total.dtype is not None
            node.replace_input_with(0, derived(model.graph, codes, "float4", ir.DataType.FLOAT4E2M1, _packed))
            inner.replace_input_with(1, derived(model.graph, total, "double", total.dtype, _double))
            _drop_cast(model.graph, node, inner)
        drop_unused(model.graph)
        return ir.passes.PassResult(model, bool(found))


def _is_nvfp4(node: ir.Node) -> bool:
    """Whether a node dequantizes int8 in blocks of 16 with scales that are float8."""
    if node.op_type != "DequantizeLinear" or node.attributes.get_int("block_size", 0) != BLOCK:
        return False
    codes, scales = node.inputs[:2]
    inner = scales.producer() if scales is not None else None
    return (
        codes is not None
        and codes.dtype == ir.DataType.INT8
        and inner is not None
        and inner.op_type == "DequantizeLinear"
        and inner.inputs[0] is not None
        and inner.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN
    )


def _drop_cast(graph: ir.Graph, outer: ir.Node, inner: ir.Node) -> None:
    """Round the scales to the type that the weight is cast to, and remove the Cast."""
    readers = [reader for reader, _ in outer.outputs[0].uses()]
    if [reader.op_type for reader in readers] != ["Cast"]:
        return
    inner.attributes["output_dtype"] = ir.AttrInt64("output_dtype", readers[0].attributes["to"].as_int())
    ir.convenience.replace_all_uses_with(readers[0].outputs[0], outer.outputs[0])
    outer.outputs[0].type = readers[0].outputs[0].type
    graph.remove(readers[0], safe=True)


def _packed(codes: Array) -> Array:
    """int8 [rows, width] -> bytes of two 4-bit floats, the first in the low half."""
    floats = CODE_OF[codes.view(np.uint8).reshape(-1)]
    return floats[0::2] | floats[1::2] << 4


def _double(total: Array) -> Array:
    return np.asarray(np.add(total, total), total.dtype)
