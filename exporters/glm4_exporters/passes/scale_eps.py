"""Scale a norm's eps by 2^-2k when its input is scaled by 2^-k: the norm's output stays the same."""

from collections.abc import Mapping

import onnx_ir as ir

from glm4_exporters.passes.builder import scope_of


class ScaleEps(ir.passes.InPlacePass):
    """Multiply the epsilon of RMSNormalization nodes by 2^-2k; runs before a pass that fuses norms.

    Args:
        bits: k by the norm's scope, as ``model.layers.3.post_mlp_layernorm``.
    """

    def __init__(self, bits: Mapping[str, int]) -> None:
        super().__init__()
        self.bits = bits

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        left = {scope for scope, k in self.bits.items() if k}
        modified = bool(left)
        for node in model.graph:
            if node.op_type == "RMSNormalization" and scope_of(node) in left:
                scope = scope_of(node)
                eps = node.attributes["epsilon"].as_float() * 2.0 ** (-2 * self.bits[scope])
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", eps)
                left.remove(scope)
        if left:
            raise ValueError(f"the graph has no RMSNormalization {', '.join(sorted(left))}")
        return ir.passes.PassResult(model, modified)
