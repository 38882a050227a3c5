"""Quantized products -> glm4::BlockQuantizedMatMul, with the bias and the MLP's gate that follow them."""

from collections.abc import Mapping

import onnx_ir as ir

from glm4_exporters.formats.arrangements import PANELS
from glm4_exporters.formats.base import CODES, SCALES, StoredFormat
from glm4_exporters.formats.brought import ZEROS
from glm4_exporters.formats.integers import IntegerCodes
from glm4_exporters.passes.builder import Builder, fixed, scope_of
from glm4_exporters.passes.stored import store
from glm4_plugins.block_product import OPERATOR, PANEL
from glm4_plugins.operator import DOMAIN, VERSION
from glm4_runtime.bundle.graph_checks import MICROSOFT


class PackedProducts(ir.passes.InPlacePass):
    """Replace FusedMatMul, for the weights in ``formats`` that are integers in blocks.

    Three kinds of matrices are left to ``QuantizeWeights``: matrices of other formats, and a tied head, because
    the lookup and the product share its data.
    """

    def __init__(self, formats: Mapping[str, StoredFormat]) -> None:
        self._formats = dict(formats)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            weight = node.inputs[1] if (node.domain, node.op_type) == (MICROSOFT, "FusedMatMul") else None
            form = self._formats.get(str(weight.name)) if weight is not None else None
            if (
                weight is None
                or not isinstance(form, IntegerCodes)
                or form.block is None
                or len(weight.uses()) > 1
            ):
                continue
            self._replace(graph, node, weight, form)
            graph.initializers.pop(str(weight.name))
            modified = True
        if modified:
            model.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, modified)

    def _replace(self, graph: ir.Graph, node: ir.Node, weight: ir.Value, form: IntegerCodes) -> None:
        assert weight.shape is not None
        assert form.block is not None
        columns, width = (fixed(axis) for axis in weight.shape)
        added = _bias_after(node)
        old = [node] if added is None else [node, added[0]]
        gate = _gate_after(old[-1], columns)
        new = Builder(graph, scope_of(gate[-1] if gate else node))
        parts = store(graph, weight, form, PANELS)
        bias = None if added is None else added[1]
        optional = [bias, parts[ZEROS]] if ZEROS in parts else [bias] if bias is not None else []
        new.op(
            OPERATOR,
            *(node.inputs[0], parts[CODES], parts[SCALES], *optional),
            domain=DOMAIN,
            columns=columns,
            width=width,
            bits=form.bits,
            block_size=form.block,
            gated=int(bool(gate)),
        )
        old += gate
        result = new.nodes[0].outputs[0]
        last = old[-1].outputs[0]
        if last.is_graph_output():
            result.name = last.name
        ir.convenience.replace_nodes_and_values(graph, old[-1], old[::-1], new.nodes, [last], [result])


def _bias_after(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """If a bias is the product's only reader: the Add node, and the bias."""
    add = _only_reader(node.outputs[0])
    if add is None or add.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    bias = next((value for value in add.inputs if value is not None and value.is_initializer()), None)
    return None if bias is None or bias.shape is None or len(bias.shape) != 1 else (add, bias)


def _gate_after(node: ir.Node, columns: int) -> list[ir.Node]:
    """The nodes Split, Sigmoid, Mul, Mul that compute silu(first half) * second half, if nothing else reads
    their inputs."""
    split = _only_reader(node.outputs[0])
    if split is None or split.op_type != "Split" or len(split.outputs) != 2 or columns % (2 * PANEL):
        return []
    gate, up = split.outputs
    readers = {use.node.op_type: use.node for use in gate.uses()}
    sigmoid, silu, product = readers.get("Sigmoid"), readers.get("Mul"), _only_reader(up)
    if sigmoid is None or silu is None or product is None or len(gate.uses()) != 2:
        return []
    halves = [value.shape[-1] for value in (gate, up) if value.shape is not None]
    if (
        any(half != columns // 2 for half in halves)
        or _only_reader(sigmoid.outputs[0]) is not silu
        or _only_reader(silu.outputs[0]) is not product
        or product.op_type != "Mul"
    ):
        return []
    return [split, sigmoid, silu, product]


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 else None
