"""GroupQueryAttention's cache -> int8, with a scale per head and channel."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from glm4_exporters.passes.builder import MICROSOFT, scope_of
from glm4_exporters.quantize.kv_cache import CacheScales

SCALE_INPUTS = 12  # k_scale, and v_scale after it
ATTRIBUTES: dict[str, str | int] = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}


class QuantizeCache(ir.passes.InPlacePass):
    """Give every GroupQueryAttention that has a cache the scales of its layer; its past and present become int8.

    The kernel rounds to even and saturates, and attends over what it stored, the new tokens' included: a
    prompt in chunks computes what it computes in one.
    """

    def __init__(self, scales: Sequence[CacheScales]) -> None:
        super().__init__()
        self._scales = scales

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [n for n in model.graph if (n.domain, n.op_type) == (MICROSOFT, "GroupQueryAttention")]
        for node, scales in zip(nodes, self._scales, strict=True):
            _quantize(model.graph, node, scales)
        return ir.passes.PassResult(model, bool(nodes))


def _quantize(graph: ir.Graph, node: ir.Node, scales: CacheScales) -> None:
    for value in (*node.inputs[3:5], *node.outputs[1:3]):  # past and present, of keys and of values
        assert value is not None, "attention without a cache"
        value.type = ir.TensorType(ir.DataType.INT8)
    node.resize_inputs(SCALE_INPUTS + 2)
    for i, (name, array) in enumerate((("key", scales.key), ("value", scales.value))):
        scale = _initializer(graph, f"{scope_of(node)}.{name}_scale", array[None, :, None])
        node.replace_input_with(SCALE_INPUTS + i, scale)
    for attribute in ir.convenience.convert_attributes(ATTRIBUTES):
        node.attributes.add(attribute)


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[np.float32]) -> ir.Value:
    """A small tensor with its data in the graph."""
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
    value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value
