"""Give TensorRT's parser MXFP8 weights with the exponents of the scales as bytes.

    float8 [out, in] -> DequantizeLinear(block 32, 16-bit powers of two)
    float8 [out, in] -> TRT_MXFP8DequantizeLinear(block 32, uint8: exponents + 127)

The parser of TensorRT-RTX 1.7 refuses the standard's scales of type E8M0.
"""

import numpy as np
import onnx_ir as ir

from glm4_exporters.formats.mxfp8 import BLOCK
from glm4_exporters.passes.builder import Builder, scope_of
from glm4_exporters.passes.derived import Array, derived, drop_unused

DOMAIN, OPERATOR = "trt", "TRT_MXFP8DequantizeLinear"  # of TensorRT's parser
BIAS = 127  # of an E8M0 exponent


class Mxfp8Weights(ir.passes.InPlacePass):
    """Replace DequantizeLinear of float8 in blocks of 32. Runs after ``SplitProducts``."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if _is_mxfp8(node)]
        for node in found:
            codes, scales = node.inputs
            assert scales is not None
            assert scales.dtype is not None
            b = Builder(model.graph, scope_of(node))
            exponents = derived(model.graph, scales, "exponents", ir.DataType.UINT8, _exponents)
            numbers = {"axis": -1, "block_size": BLOCK, "output_dtype": int(scales.dtype)}
            new = b.op(OPERATOR, codes, exponents, domain=DOMAIN, **numbers)
            b.nodes[-1].name = node.name
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], b.nodes, node.outputs, [new])
        if found:
            model.graph.opset_imports[DOMAIN] = 1
        drop_unused(model.graph)
        return ir.passes.PassResult(model, bool(found))


def _is_mxfp8(node: ir.Node) -> bool:
    return (
        node.op_type == "DequantizeLinear"
        and node.inputs[0] is not None
        and node.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN
        and node.attributes.get_int("block_size", 0) == BLOCK
    )


def _exponents(scales: Array) -> Array:
    return (np.log2(scales.astype(np.float32)) + BIAS).astype(np.uint8)
