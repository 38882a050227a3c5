"""MatMul by a transposed weight -> com.microsoft.FusedMatMul, so that weights stay as the checkpoint has them."""

import onnx_ir as ir

from glm4_exporters.passes.builder import Builder, scope_of
from glm4_runtime.bundle.graph_checks import MICROSOFT


class TransposedMatMul(ir.passes.InPlacePass):
    """Fold Transpose(weight [out, in]) into the product.

    Without this pass, ONNX Runtime folds each Transpose into a second copy of the weight while it loads.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            transpose = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
            if transpose is None or transpose.op_type != "Transpose":
                continue
            weight = transpose.inputs[0]
            if (
                weight is None
                or not weight.is_initializer()
                or transpose.attributes["perm"].as_ints() != (1, 0)
            ):
                continue
            b = Builder(graph, scope_of(node))
            b.op("FusedMatMul", node.inputs[0], weight, domain=MICROSOFT, transB=1)
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], b.nodes, node.outputs, b.nodes[0].outputs
            )
            if not transpose.outputs[0].uses():
                graph.remove(transpose, safe=True)
            modified = True
        if modified:
            model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified)
