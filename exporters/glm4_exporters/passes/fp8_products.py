"""Products of the native dialect in fp8: weights and inputs by Q and DQ, a scale per tensor each.

The form that TensorRT-RTX turns into an fp8 product (``tests/exporters/test_engine_quantization.py`` holds it):

    x -> QuantizeLinear -> DequantizeLinear ------\\
    w [out, in] fp8 -> DequantizeLinear -> Transpose -> MatMul

A weight keeps its name and becomes float8_e4m3fn; its scale is a new initializer without data, the scalar
``<weight>.scale``, which the weights' writer fills by :func:`fp8_scale` as it casts by :func:`fp8_values`.

Scales per output channel build as well, but TensorRT-RTX 1.7 multiplies by them after the product has been rounded to
the activations' type: sums of weights of up to 448 leave float16's range there. With one scale both factors
are applied in float32, before the rounding.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from glm4_exporters.passes.builder import Builder, scope_of
from glm4_runtime.errors import ExportError

FP8_MAX = 448.0  # of float8_e4m3fn
SCALE_SUFFIX = ".scale"


def fp8_scale(absmax: float) -> float:
    """The scale of a tensor whose largest magnitude is ``absmax``, an input's or a weight's; never zero."""
    return (
        max(absmax, FP8_MAX * 2.0**-14) / FP8_MAX
    )  # 2^-14, the smallest number of full precision in float16


def fp8_values(values: Tensor, scale: float) -> Tensor:
    """float32 values over their tensor's scale, as float8_e4m3fn."""
    return (values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


class Fp8Products(ir.passes.InPlacePass):
    """Quantize the products of some weights, and their inputs.

    Args:
        scales: per weight name, the scale of the product's input, as :func:`fp8_scale` gives it from the
            largest magnitude seen on calibration text. Products of other weights stay as they are.

    Raises:
        ExportError: a weight that no product of the graph reads.
    """

    def __init__(self, scales: Mapping[str, float]) -> None:
        super().__init__()
        self.scales = scales

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, found = model.graph, set()
        inputs: dict[tuple[int, float], ir.Value] = {}
        for node in list(graph):
            weight = _weight_of(node)
            if weight is None or weight.name not in self.scales:
                continue
            found.add(str(weight.name))
            _quantize_weight(graph, node, weight)
            _quantize_input(graph, node, self.scales[str(weight.name)], inputs)
        lost = sorted(self.scales.keys() - found)
        if lost:
            raise ExportError(
                f"no product of the graph reads {', '.join(lost)}; calibrate the model that is exported"
            )
        return ir.passes.PassResult(model, bool(found))


def _weight_of(node: ir.Node) -> ir.Value | None:
    """The initializer [out, in] that a product reads transposed."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    value = transpose.inputs[0]
    return value if value is not None and value.is_initializer() else None


def _quantize_weight(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    assert transpose is not None
    scale = ir.Value(
        name=f"{weight.name}{SCALE_SUFFIX}",
        type=ir.TensorType(weight.dtype) if weight.dtype is not None else None,
        shape=ir.Shape([]),
    )
    graph.initializers[str(scale.name)] = scale
    weight.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    b = Builder(graph, scope_of(node))
    transpose.replace_input_with(0, b.op("DequantizeLinear", weight, scale))
    graph.insert_before(transpose, b.nodes)


def _quantize_input(
    graph: ir.Graph, node: ir.Node, scale: float, known: dict[tuple[int, float], ir.Value]
) -> None:
    """Products of one input and one scale share its Q and DQ."""
    x = node.inputs[0]
    assert x is not None
    key = id(x), scale
    if key not in known:
        b = Builder(graph, f"{scope_of(node)}/input")
        dtype = graph.initializers[f"{_weight_name(node)}{SCALE_SUFFIX}"].dtype
        assert dtype is not None
        parameters = (
            _constant(graph, f"{_weight_name(node)}.input_scale", np.asarray(scale, dtype.numpy())),
            _constant(graph, "constant.fp8_zero", np.zeros((), ml_dtypes.float8_e4m3fn)),
        )
        quantized = b.op("QuantizeLinear", x, *parameters)
        known[key] = b.op("DequantizeLinear", quantized, *parameters)
        graph.insert_before(node, b.nodes)
    node.replace_input_with(0, known[key])


def _weight_name(node: ir.Node) -> str:
    """Of the weight behind a product's Transpose and DequantizeLinear."""
    value = node.inputs[1]
    while value is not None and (producer := value.producer()) is not None:
        value = producer.inputs[0]
    assert value is not None
    return str(value.name)


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(array.shape),
                const_value=tensor,
            )
        )
    return graph.initializers[name]
