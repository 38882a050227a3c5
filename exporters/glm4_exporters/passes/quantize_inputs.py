"""Products of integer weights become products of integers: their inputs get QuantizeLinear and DequantizeLinear.

    x -> QuantizeLinear -> DequantizeLinear ----------------\\
    w [out, in] int8 -> DequantizeLinear(axis 0) -> Transpose -> MatMul

ONNX Runtime 1.32 runs this as QuantizeLinear and MatMulIntegerToFloat, and takes the Transpose through the
DequantizeLinear by itself. Where q, k and v share one input it does so only if that is unsigned. TensorRT
takes no unsigned numbers and no zero points. In both the steps are the same.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from glm4_exporters.passes.builder import Builder, scope_of
from glm4_exporters.passes.quantize_weights import Source
from glm4_runtime.errors import ExportError

# Per dialect, what stands for 0; its type is that of the integers.
ZEROS: dict[str, np.integer[Any]] = {"ort": np.uint8(128), "cpu": np.uint8(128), "native": np.int8(0)}


class QuantizeInputs(ir.passes.InPlacePass):
    """Quantize what some integer matrices read, under one scale each. Runs after ``QuantizeWeights``.

    Args:
        dialect: decides whether inputs are signed.
        scales: by canonical name of the matrix. Products of one input and one scale share its integers.

    Raises:
        ExportError: a matrix that no product of the graph reads.
    """

    def __init__(self, dialect: str, scales: Mapping[str, float]) -> None:
        self._zero, self._scales = np.asarray(ZEROS[dialect]), dict(scales)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, found = model.graph, set()
        known: dict[tuple[int, float], ir.Value] = {}
        for node in list(graph):
            name, dtype = _matrix_of(node)
            if dtype is None or name not in self._scales:
                continue
            found.add(name)
            x, scale = node.inputs[0], self._scales[name]
            assert x is not None
            if (id(x), scale) not in known:
                b = Builder(graph, f"{scope_of(node)}/input")
                step = _constant(graph, f"{name}.input_scale", np.asarray(scale, dtype.numpy()))
                zero = _constant(graph, f"constant.{self._zero.dtype}_zero", self._zero)
                integers = b.op("QuantizeLinear", x, step, zero)
                known[id(x), scale] = b.op("DequantizeLinear", integers, step, zero)
                graph.insert_before(node, b.nodes)
            node.replace_input_with(0, known[id(x), scale])
        lost = sorted(self._scales.keys() - found)
        if lost:
            raise ExportError(f"no product of the graph reads {', '.join(lost)} as integers")
        return ir.passes.PassResult(model, bool(found))


def _matrix_of(node: ir.Node) -> tuple[str, ir.DataType | None]:
    """The integer matrix that a MatMul reads through DequantizeLinear and Transpose: its name, and as what type."""
    value, dtype = (node.inputs[1] if node.op_type == "MatMul" else None), None
    for operator in ("Transpose", "DequantizeLinear"):
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != operator:
            return "", None
        value, dtype = producer.inputs[0], producer.outputs[0].dtype
    source = value.meta.get("source") if value is not None else None
    return (source.tensor, dtype) if isinstance(source, Source) else ("", None)


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([]), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]
