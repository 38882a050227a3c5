"""The cache of our attention operator on a CPU -> float16, bfloat16, or int8 with a scale in each row.

``glm4_plugins/cpu/attention.h`` defines the stored numbers.
"""

from collections.abc import Sequence

import onnx_ir as ir

from glm4_exporters.element_types import ir_type
from glm4_exporters.passes.builder import Builder, fixed, scope_of
from glm4_exporters.quantize.calibrate import Magnitudes
from glm4_plugins.operator import DOMAIN, INPUTS, OP_TYPE
from glm4_runtime.bundle.element_types import CACHE_TYPES


class NarrowCache(ir.passes.InPlacePass):
    """Change the type of past and present of every attention node, and their rows' width.

    A quantized cache also takes the factors [Hkv, D] of each layer's keys.
    """

    def __init__(self, kv_cache: str, key_factors: Sequence[Magnitudes] = ()) -> None:
        """``kv_cache``: a name in ``CACHE_TYPES``."""
        super().__init__()
        self._stored, self._factors = CACHE_TYPES[kv_cache], key_factors

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
        for node in nodes:
            for value in (*node.inputs[3:5], *node.outputs[1:3]):  # past and present, of keys and of values
                assert value is not None, "attention without a cache"
                self._retype(value)
        if self._stored.quantized:
            for node, factors in zip(nodes, self._factors, strict=True):
                node.resize_inputs(len(INPUTS) + 1)
                b = Builder(model.graph, scope_of(node))
                node.replace_input_with(len(INPUTS), b.named(f"{b.scope}.key_factors", factors))
        return ir.passes.PassResult(model, bool(nodes))

    def _retype(self, value: ir.Value) -> None:
        value.type = ir.TensorType(ir_type(self._stored.element))
        if value.shape is not None:
            *axes, head_dim = value.shape
            value.shape = ir.Shape([*axes, self._stored.row(fixed(head_dim))])
