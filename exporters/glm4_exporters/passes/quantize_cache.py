"""The cache of attention -> int8, with a scale per head and channel."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from glm4_exporters.passes.builder import Builder, scope_of
from glm4_exporters.quantize.kv_cache import CacheScales
from glm4_plugins.launch import PLUGIN_INPUTS
from glm4_plugins.operator import DOMAIN, INPUTS, OP_TYPE, PLUGIN_INT8
from glm4_runtime.bundle.graph_checks import MICROSOFT


@dataclass(frozen=True)
class _Form:
    """How an operator accepts an int8 cache.

    Attributes:
        key_scale: index of the input with the keys' scales; the values' scales are the next input.
        shape: of the scales of [Hkv, D].
        op_type: the operator's name with an int8 cache; None if unchanged.
    """

    key_scale: int
    shape: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
    attributes: Mapping[str, str | int]
    op_type: str | None = None


FORMS = {
    (MICROSOFT, "GroupQueryAttention"): _Form(
        12,
        lambda scales: scales[None, :, None],
        {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8},
    ),
    (DOMAIN, OP_TYPE): _Form(len(INPUTS), lambda scales: scales, {}),
}

PLUGIN = _Form(len(PLUGIN_INPUTS), lambda scales: scales, {}, PLUGIN_INT8)  # TensorRT's


def _form_of(node: ir.Node) -> _Form | None:
    return PLUGIN if "aot" in node.attributes else FORMS.get((node.domain, node.op_type))


class QuantizeCache(ir.passes.InPlacePass):
    """Add the layer's scales to every attention node with a cache; its past and present become int8.

    The kernels round to even, saturate, and attend over stored values, also for the new tokens. So a
    prompt in chunks gives the same result as a prompt in one run.
    """

    def __init__(self, scales: Sequence[CacheScales]) -> None:
        super().__init__()
        self._scales = scales

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if _form_of(node) is not None]
        for node, scales in zip(nodes, self._scales, strict=True):
            _quantize(model.graph, node, scales)
        return ir.passes.PassResult(model, bool(nodes))


def _quantize(graph: ir.Graph, node: ir.Node, scales: CacheScales) -> None:
    form, b = _form_of(node), Builder(graph, scope_of(node))
    assert form is not None
    for value in (*node.inputs[3:5], *node.outputs[1:3]):  # past and present, of keys and of values
        assert value is not None, "attention without a cache"
        value.type = ir.TensorType(ir.DataType.INT8)
    node.resize_inputs(form.key_scale + 2)
    for i, (name, array) in enumerate((("key", scales.key), ("value", scales.value))):
        scale = b.named(f"{b.scope}.{name}_scale", form.shape(array))
        node.replace_input_with(form.key_scale + i, scale)
    for attribute in ir.convenience.convert_attributes(form.attributes):
        node.attributes.add(attribute)
    node.op_type = form.op_type or node.op_type
