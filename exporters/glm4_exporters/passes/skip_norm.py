"""Add + RMSNormalization -> com.microsoft.SkipSimplifiedLayerNormalization, which also gives the sum."""

import onnx_ir as ir

from glm4_exporters.passes.builder import Builder, scope_of
from glm4_runtime.bundle.graph_checks import MICROSOFT


class SkipNorm(ir.passes.InPlacePass):
    """Fuse a residual sum with the norm that reads it; other readers of the sum use the fourth output."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            add = node.inputs[0].producer() if node.op_type == "RMSNormalization" and node.inputs[0] else None
            if (
                add is None
                or add.op_type != "Add"
                or any(x is None or x.is_initializer() for x in add.inputs)
            ):
                continue
            residual, branch = add.inputs
            b = Builder(graph, scope_of(node))
            b.op(
                "SkipSimplifiedLayerNormalization",
                *(branch, residual, node.inputs[1]),
                outputs=4,
                domain=MICROSOFT,
                epsilon=node.attributes["epsilon"].as_float(),
            )
            normed, mean, deviation, total = b.nodes[0].outputs
            mean.name = deviation.name = ""  # unused outputs are left out
            ir.convenience.replace_nodes_and_values(
                graph, add, [node, add], b.nodes, [node.outputs[0], add.outputs[0]], [normed, total]
            )
            modified = True
        if modified:
            model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified)
