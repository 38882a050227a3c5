"""The nodes that follow a matrix product: its bias, and the MLP's gate."""

import onnx_ir as ir

from glm4_plugins.block_product import PANEL


def bias_after(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """If a bias is the product's only reader: the Add node, and the bias."""
    add = only_reader(node.outputs[0])
    if add is None or add.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    bias = next((value for value in add.inputs if value is not None and value.is_initializer()), None)
    return None if bias is None or bias.shape is None or len(bias.shape) != 1 else (add, bias)


def gate_after(node: ir.Node, columns: int) -> list[ir.Node]:
    """The nodes Split, Sigmoid, Mul, Mul that compute silu(first half) * second half, if nothing else reads
    their inputs."""
    split = only_reader(node.outputs[0])
    if split is None or split.op_type != "Split" or len(split.outputs) != 2 or columns % (2 * PANEL):
        return []
    gate, up = split.outputs
    readers = {use.node.op_type: use.node for use in gate.uses()}
    sigmoid, silu, product = readers.get("Sigmoid"), readers.get("Mul"), only_reader(up)
    if sigmoid is None or silu is None or product is None or len(gate.uses()) != 2:
        return []
    halves = [value.shape[-1] for value in (gate, up) if value.shape is not None]
    if (
        any(half != columns // 2 for half in halves)
        or only_reader(sigmoid.outputs[0]) is not silu
        or only_reader(silu.outputs[0]) is not product
        or product.op_type != "Mul"
    ):
        return []
    return [split, sigmoid, silu, product]


def only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 else None
