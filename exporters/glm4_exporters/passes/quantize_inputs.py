"""Insert QuantizeLinear and DequantizeLinear before products whose format rounds inputs.

    x -> QuantizeLinear -> DequantizeLinear -------\\
    codes [out, in] -> DequantizeLinear -> Transpose -> MatMul

Integers: ONNX Runtime 1.32 fuses this into QuantizeLinear and MatMulIntegerToFloat, Transpose included. If q, k
and v share one input, it fuses only unsigned inputs. TensorRT accepts neither unsigned integers nor zero
points. The rounding is the same in both. float8: TensorRT-RTX multiplies in fp8
(``tests/exporters/test_engine_quantization.py`` tests this).
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from glm4_exporters.element_types import ir_type
from glm4_exporters.formats.base import InputRounding
from glm4_exporters.passes.builder import Builder, scope_of
from glm4_exporters.passes.fp4_inputs import add_rounding
from glm4_exporters.passes.stored import Source, source_of
from glm4_runtime.errors import ExportError


class QuantizeInputs(ir.passes.InPlacePass):
    """Round the inputs of some matrices, with one scale each. Runs after ``QuantizeWeights``.

    Args:
        scales: by canonical name of the matrix. Products of one input and one scale share the rounded input.
        unsigned: whether integers are stored with an offset of 128.

    Raises:
        ExportError: a matrix that no product of the graph reads.
    """

    def __init__(self, scales: Mapping[str, float], *, unsigned: bool) -> None:
        self._scales, self._unsigned = dict(scales), unsigned

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, found = model.graph, set()
        known: dict[tuple[int, float], ir.Value] = {}
        for node in list(graph):
            source, dtype = _matrix_of(node)
            if source is None or dtype is None or source.matrix.name not in self._scales:
                continue
            name, x = source.matrix.name, node.inputs[0]
            found.add(name)
            assert x is not None
            key = id(x), self._scales[name]
            if key not in known:
                known[key] = self._rounded(graph, node, source, dtype)
            node.replace_input_with(0, known[key])
        lost = sorted(self._scales.keys() - found)
        if lost:
            raise ExportError(
                f"no product of the graph reads {', '.join(lost)}; calibrate the model that is exported"
            )
        return ir.passes.PassResult(model, bool(found))

    def _rounded(self, graph: ir.Graph, node: ir.Node, source: Source, dtype: ir.DataType) -> ir.Value:
        """The input of a product, rounded, in the type ``dtype``."""
        rounding, name = source.matrix.format.inputs, source.matrix.name
        assert rounding is not None
        b = Builder(graph, f"{scope_of(node)}/input")
        if rounding.block is not None:
            x = node.inputs[0]
            assert x is not None
            value = add_rounding(b, x, self._scales[name], name, dtype)
            graph.insert_before(node, b.nodes)
            return value
        step = b.named(f"{name}.input_scale", np.asarray(self._scales[name], dtype.numpy()))
        zero = self._zero(rounding)
        parameters = step, b.named(f"constant.{zero.dtype}_zero", zero)
        value = b.op("DequantizeLinear", b.op("QuantizeLinear", node.inputs[0], *parameters), *parameters)
        graph.insert_before(node, b.nodes)
        return value

    def _zero(self, rounding: InputRounding) -> "np.ndarray[tuple[()], np.dtype[np.generic]]":
        """The zero point; its type is the type of the rounded numbers."""
        if self._unsigned and rounding.dtype == "int8":
            return np.asarray(128, np.uint8)
        return np.asarray(0, ir_type(rounding.dtype).numpy())


def _matrix_of(node: ir.Node) -> tuple[Source | None, ir.DataType | None]:
    """The matrix that a MatMul reads through DequantizeLinear and Transpose, and the type of its values."""
    value, dtype = (node.inputs[1] if node.op_type == "MatMul" else None), None
    for operator in ("Transpose", "DequantizeLinear"):
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != operator:
            return None, None
        value, dtype = producer.inputs[0], producer.outputs[0].dtype
    return source_of(value), dtype
