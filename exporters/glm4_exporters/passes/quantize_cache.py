"""GroupQueryAttention's cache -> int8, with a scale per head and channel."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from glm4_exporters.passes.builder import MICROSOFT, scope_of
from glm4_exporters.quantize.kv_cache import CacheScales

SCALE_INPUTS = 12  # k_scale, and v_scale after it


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
    past_and_present = (*node.inputs[3:5], *node.outputs[1:3])
    for value in past_and_present:
        assert value is not None, "attention without a cache"
        value.type = ir.TensorType(ir.DataType.INT8)
    node.resize_inputs(SCALE_INPUTS + 2)
    for i, (name, array) in enumerate((("key", scales.key), ("value", scales.value))):
        tensor = ir.tensor(np.ascontiguousarray(array[None, :, None]), name=f"{scope_of(node)}.{name}_scale")
        scale = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor
        )
        graph.register_initializer(scale)
        node.replace_input_with(SCALE_INPUTS + i, scale)
    kinds: dict[str, str | int] = {
        "k_quant_type": "PER_CHANNEL",
        "v_quant_type": "PER_CHANNEL",
        "kv_cache_bit_width": 8,
    }
    for attribute in ir.convenience.convert_attributes(kinds):
        node.attributes.add(attribute)
