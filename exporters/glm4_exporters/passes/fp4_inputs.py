"""Round a product's input to NVFP4: 4-bit floats (E2M1) with a float8 scale for each block of 16.

The scale of a block is max |x| / 6, rounded to float8 with one more scale for the whole tensor, from the calibration.
ONNX Runtime has no kernel for 4-bit floats. So the bundle's graph computes the same numbers by standard operators, in
float32, and :class:`Fp4Inputs` gives TensorRT's parser its own operator:

    Reshape -> ... -> Reshape  becomes  TRT_FP4DynamicQuantize -> DequantizeLinear(block 16)

TensorRT-RTX 1.7 then multiplies 4-bit floats by 4-bit floats (``tests/exporters/test_engine_quantization.py``).
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from glm4_exporters.formats.nvfp4 import BLOCK
from glm4_exporters.formats.nvfp4 import LARGEST as LARGEST_DOUBLED
from glm4_exporters.passes.builder import Builder, scope_of

DOMAIN, OPERATOR = "trt", "TRT_FP4DynamicQuantize"  # of TensorRT's parser
TINY = 1e-20  # keeps a block of zeros from dividing by zero; too small to change another scale


def add_rounding(b: Builder, x: ir.Value, total: float, name: str, dtype: ir.DataType) -> ir.Value:
    """``x`` [B, S, width], rounded, in the type ``dtype``.

    Args:
        total: the scale of the blocks' scales.
        name: of the matrix that reads ``x``.
    """
    wide = b.op("Cast", b.op("Reshape", x, b.constant([0, 0, -1, BLOCK])), to=ir.DataType.FLOAT)
    half = _half_scales(b, wide, total, name)
    limits = (_number(b, sign * LARGEST_DOUBLED) for sign in (-1, 1))
    doubled = b.op("Clip", b.op("Div", wide, half), *limits)
    inverse = _inverse_steps(b, b.op("Abs", doubled))
    one, zero = _number(b, 1), b.named("constant.int8_zero", np.zeros((), np.int8))
    steps = b.op("QuantizeLinear", b.op("Mul", doubled, inverse), one, zero)  # to the nearest, ties to even
    rounded = b.op("Div", b.op("DequantizeLinear", steps, one, zero), inverse)
    flat = b.op("Reshape", b.op("Mul", rounded, half), b.constant([0, 0, -1]))
    return b.op("Cast", flat, to=dtype)


def _half_scales(b: Builder, wide: ir.Value, total: float, name: str) -> ir.Value:
    """Half the scale of each block: max |x| / 6, as float8 times ``total``."""
    largest = b.op("ReduceMax", b.op("Abs", wide), b.constant([-1]), keepdims=1)
    parameters = (
        b.named(f"{name}.input_scale", np.asarray(total, np.float32)),
        b.named("constant.float8_zero", np.zeros((), ml_dtypes.float8_e4m3fn)),
    )
    codes = b.op("QuantizeLinear", b.op("Mul", largest, _number(b, 2 / LARGEST_DOUBLED)), *parameters)
    scales = b.op("DequantizeLinear", codes, *parameters)
    return b.op("Add", b.op("Mul", scales, _number(b, 0.5)), _number(b, TINY))


def _inverse_steps(b: Builder, size: ir.Value) -> ir.Value:
    """1 / the distance of twice the 4-bit floats: 1 up to 4, 2 up to 8, 4 above."""
    inverse = _number(b, 1)
    for start, less in ((4, 0.5), (8, 0.25)):
        above = b.op("Cast", b.op("Less", _number(b, start), size), to=ir.DataType.FLOAT)
        inverse = b.op("Sub", inverse, b.op("Mul", above, _number(b, less)))
    return inverse


def _number(b: Builder, value: float) -> ir.Value:
    return b.named(f"constant.{value:g}.float32", np.asarray(value, np.float32))


class Fp4Inputs(ir.passes.InPlacePass):
    """Replace the standard operators of :func:`add_rounding` by TensorRT's own."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if _is_scale(node)]
        for node in found:
            _replace(model.graph, node)
        if found:
            model.graph.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, bool(found))


def _is_scale(node: ir.Node) -> bool:
    """Whether a node rounds the largest magnitudes of blocks to float8."""
    return node.op_type == "QuantizeLinear" and _before(node, "Mul", "ReduceMax") is not None


def _before(node: ir.Node, *operators: str) -> ir.Node | None:
    """The last of a chain of producers, each by its first input; None if an operator differs."""
    found: ir.Node | None = node
    for operator in operators:
        assert found is not None
        value = found.inputs[0]
        found = value.producer() if value is not None else None
        if found is None or found.op_type != operator:
            return None
    return found


def _replace(graph: ir.Graph, scale: ir.Node) -> None:
    first = _before(scale, "Mul", "ReduceMax", "Abs", "Cast", "Reshape")
    assert first is not None
    scope = scope_of(scale)
    old = [node for node in graph if str(node.name).startswith(f"{scope}/")]
    x, last, total = first.inputs[0], old[-1], scale.inputs[1]
    dtype = last.outputs[0].dtype or ir.DataType(last.attributes["to"].as_int())
    assert total is not None
    assert total.const_value is not None
    b = Builder(graph, scope)
    narrow = b.named(f"{total.name}.{dtype.name.lower()}", total.const_value.numpy().astype(dtype.numpy()))
    scale_type = int(ir.DataType.FLOAT8E4M3FN)
    codes = b.op(
        OPERATOR, x, narrow, outputs=2, domain=DOMAIN, axis=-1, block_size=BLOCK, scale_type=scale_type
    )
    scales = b.op("DequantizeLinear", b.nodes[-1].outputs[1], narrow)
    rounded = b.op("DequantizeLinear", codes, scales, axis=-1, block_size=BLOCK)
    ir.convenience.replace_nodes_and_values(graph, first, old, b.nodes, last.outputs, [rounded])
