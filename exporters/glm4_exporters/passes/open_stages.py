"""Makes the hidden states between two stages a value that one stage computes and the next reads.

A fused norm takes a residual sum's two terms, so a cut in front of it would hand over two tensors. The sum gets a node
of its own, and the norm adds zeros to it. The bits stay: x + 0 = x, and both nodes add the same two numbers.
"""

from collections.abc import Sequence

import onnx_ir as ir

from glm4_exporters.passes.builder import Builder, scope_of
from glm4_runtime.bundle.graph_io import hidden_name


class OpenStages(ir.passes.InPlacePass):
    """Separate the residual sum in front of each layer of ``first_layers``, except layer 0, from its norm."""

    def __init__(self, first_layers: Sequence[int]) -> None:
        super().__init__()
        self._sums = {hidden_name(layer - 1) for layer in first_layers if layer}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            total = next((value for value in node.outputs if value.name in self._sums), None)
            if total is not None and node.op_type == "SkipSimplifiedLayerNormalization":
                _separate(model.graph, node, total)
                modified = True
        return ir.passes.PassResult(model, modified)


def _separate(graph: ir.Graph, node: ir.Node, total: ir.Value) -> None:
    branch, residual, weight = node.inputs
    before = Builder(graph, str(total.name).rpartition("/")[0])
    hidden = before.op("Add", residual, branch)
    b = Builder(graph, scope_of(node))
    zeros = b.op("Sub", hidden, hidden)
    epsilon = node.attributes["epsilon"].as_float()
    normed = b.op(node.op_type, hidden, zeros, weight, domain=node.domain, epsilon=epsilon)
    new = [*before.nodes, *b.nodes]
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], new, [node.outputs[0], total], [normed, hidden]
    )
