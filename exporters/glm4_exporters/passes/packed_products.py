"""Quantized products -> glm4::BlockQuantizedMatMul, with the bias and the MLP's gate that follow them."""

from collections.abc import Mapping

import onnx_ir as ir

from glm4_exporters.formats.arrangements import PANELS
from glm4_exporters.formats.base import CODES, SCALES, StoredFormat
from glm4_exporters.formats.brought import ZEROS
from glm4_exporters.formats.integers import IntegerCodes
from glm4_exporters.passes.builder import Builder, fixed, scope_of
from glm4_exporters.passes.followers import bias_after, gate_after
from glm4_exporters.passes.stored import store
from glm4_plugins.block_product import OPERATOR
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
        added = bias_after(node)
        old = [node] if added is None else [node, added[0]]
        gate = gate_after(old[-1], columns)
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
