"""The cache of attention -> int8 or fp8, with a scale per head and channel."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from glm4_exporters.element_types import ir_type
from glm4_exporters.passes.builder import Builder, scope_of
from glm4_exporters.quantize.kv_cache import CacheScales
from glm4_plugins.launch import PLUGIN_INPUTS
from glm4_plugins.operator import DOMAIN, INPUTS, OP_TYPE, PLUGIN_FP8, PLUGIN_INT8
from glm4_runtime.bundle.graph_checks import MICROSOFT


@dataclass(frozen=True)
class _Form:
    """How an operator accepts a quantized cache.

    Attributes:
        key_scale: index of the input with the keys' scales; the values' scales are the next input.
        shape: of the scales of [Hkv, D].
        op_type: the operator's name with this cache; None if unchanged.
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

# TensorRT's plugins, by the cache's element type.
PLUGINS = {
    element: _Form(len(PLUGIN_INPUTS), lambda scales: scales, {}, name)
    for element, name in (("int8", PLUGIN_INT8), ("float8e4m3fn", PLUGIN_FP8))
}


class QuantizeCache(ir.passes.InPlacePass):
    """Add the layer's scales to every attention node with a cache; its past and present become ``element``.

    The kernels round to even, saturate, and attend over stored values, also for the new tokens. So a
    prompt in chunks gives the same result as a prompt in one run.
    """

    def __init__(self, scales: Sequence[CacheScales], element: str = "int8") -> None:
        super().__init__()
        self._scales, self._element = scales, element

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [(node, form) for node in model.graph if (form := self._form_of(node)) is not None]
        for (node, form), scales in zip(found, self._scales, strict=True):
            _quantize(model.graph, node, form, scales, ir_type(self._element))
        return ir.passes.PassResult(model, bool(found))

    def _form_of(self, node: ir.Node) -> _Form | None:
        if "aot" in node.attributes:
            return PLUGINS[self._element]
        return FORMS.get((node.domain, node.op_type)) if self._element == "int8" else None


def _quantize(graph: ir.Graph, node: ir.Node, form: _Form, scales: CacheScales, element: ir.DataType) -> None:
    b = Builder(graph, scope_of(node))
    for value in (*node.inputs[3:5], *node.outputs[1:3]):  # past and present, of keys and of values
        assert value is not None, "attention without a cache"
        value.type = ir.TensorType(element)
    node.resize_inputs(form.key_scale + 2)
    for i, (name, array) in enumerate((("key", scales.key), ("value", scales.value))):
        scale = b.named(f"{b.scope}.{name}_scale", form.shape(array))
        node.replace_input_with(form.key_scale + i, scale)
    for attribute in ir.convenience.convert_attributes(form.attributes):
        node.attributes.add(attribute)
    node.op_type = form.op_type or node.op_type
