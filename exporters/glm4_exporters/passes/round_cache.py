"""Round keys and values as a quantized cache does, in a graph whose cache has the activations' type.

TensorScatter(past, x) -> TensorScatter(past, DequantizeLinear(QuantizeLinear(x * steps)) * scale, with steps = 1 / scale)

An engine with our plugin stores 8-bit numbers. The graph that parity checks computes the same numbers, so that parity
and ``validate`` include the rounding.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from glm4_exporters.element_types import ir_type
from glm4_exporters.passes.builder import Builder, scope_of
from glm4_exporters.quantize.calibrate import Magnitudes
from glm4_exporters.quantize.kv_cache import CacheScales


class RoundCache(ir.passes.InPlacePass):
    """Runs after ``NativeAttention``. ``element`` is the cache's type, such as ``int8``."""

    def __init__(self, scales: Sequence[CacheScales], element: str) -> None:
        super().__init__()
        self._scales, self._element = scales, ir_type(element)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        writes = [node for node in model.graph if node.op_type == "TensorScatter"]
        for key, value, scales in zip(writes[::2], writes[1::2], self._scales, strict=True):
            b = Builder(model.graph, scope_of(key))
            self._round(b, key, "key", scales.key)
            self._round(b, value, "value", scales.value)
            model.graph.insert_before(key, b.nodes)
        return ir.passes.PassResult(model, bool(writes))

    def _round(self, b: Builder, write: ir.Node, name: str, scales: Magnitudes) -> None:
        past, new = write.inputs[:2]  # [B, Hkv, C, D] and [B, Hkv, S, D]
        assert past is not None
        assert past.dtype is not None
        scale = b.named(f"{b.scope}.{name}_scale", scales[None, :, None])
        one = b.named("constant.one.float32", np.ones((), np.float32))
        zero = b.named(f"constant.zero.{self._element.name.lower()}", np.zeros((), self._element.numpy()))
        steps = b.named(f"{b.scope}.{name}_steps", 1 / scales[None, :, None])
        codes = b.op("QuantizeLinear", b.op("Mul", b.op("Cast", new, to=ir.DataType.FLOAT), steps), one, zero)
        rounded = b.op("Cast", b.op("Mul", b.op("DequantizeLinear", codes, one, zero), scale), to=past.dtype)
        write.replace_input_with(1, rounded)
