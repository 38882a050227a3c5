"""Matrix products -> products plus those of the LoRA adapter that each sequence names at run time.

    y = x Wᵀ + b   ->   y = x Wᵀ + b + (x A) B

Rows of other sequences take no part in a row's sums.
"""

import onnx_ir as ir

from glm4_exporters.element_types import ir_type
from glm4_exporters.passes.builder import Builder, graph_input, scope_of
from glm4_exporters.passes.followers import bias_after, gate_after
from glm4_plugins.lora_product import OPERATOR
from glm4_plugins.operator import DOMAIN, VERSION
from glm4_runtime.bundle import AdapterSlots
from glm4_runtime.bundle.adapter_inputs import (
    PACKED_DIALECT,
    PLACES,
    ROWS,
    adapter_specs,
    packed_name,
    stacked_names,
)

PREFIX = "lora."  # in the names of the new nodes


class AddAdapters(ir.passes.InPlacePass):
    """Extend the products by the matrices in ``slots``. Runs on the canonical graph.

    The packed form is one ``glm4::LoraProduct``, which also computes the MLP's gate with the kernel that a product
    without adapters has. So rows without an adapter have the bits of the graph without adapters. The stacked form has
    standard operators.
    """

    def __init__(self, slots: AdapterSlots, dialect: str, activations: str) -> None:
        self._slots, self._dialect, self._activations = slots, dialect, ir_type(activations)
        self._places = {name: place for place, name in enumerate(sorted(slots.matrices))}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for spec in adapter_specs(self._slots, self._dialect):
            kind = ir.TensorType(ir_type(spec.dtype))
            graph.inputs.append(ir.Value(name=spec.name, type=kind, shape=ir.Shape(spec.shape)))
        found = set()
        for node in list(graph):
            matrix = _matrix_of(node)
            if matrix in self._places:
                found.add(matrix)
                self._extend(graph, node, matrix)
        missing = self._places.keys() - found
        assert not missing, f"the graph has no product by {sorted(missing)}"
        if self._dialect == PACKED_DIALECT:
            model.opset_imports[DOMAIN] = VERSION
        return ir.passes.PassResult(model, True)

    def _extend(self, graph: ir.Graph, product: ir.Node, matrix: str) -> None:
        bias = bias_after(product)
        last = product if bias is None else bias[0]
        x, y = product.inputs[0], last.outputs[0]
        assert x is not None
        columns = self._slots.matrices[matrix][0]
        gate = gate_after(last, columns) if self._dialect == PACKED_DIALECT else []
        new = Builder(graph, scope_of(gate[-1] if gate else product), PREFIX)
        if self._dialect == PACKED_DIALECT:
            total = self._packed(new, x, y, matrix, bool(gate))
        else:
            total = self._stacked(new, x, y, matrix)
        replaced = gate[-1].outputs[0] if gate else y
        total.type, total.shape = replaced.type, replaced.shape
        readers = [(user, index) for user, index in replaced.uses() if user not in new.nodes]
        for user, index in readers:
            user.replace_input_with(index, total)
        for place, value in enumerate(graph.outputs):
            if value is replaced:
                graph.outputs[place] = total
                replaced.name, total.name = total.name, replaced.name
        graph.insert_after(last, new.nodes)
        graph.remove(gate[::-1], safe=True)

    def _packed(self, new: Builder, x: ir.Value, y: ir.Value, matrix: str, gated: bool) -> ir.Value:
        adapters = [_input(new.graph, packed_name(slot)) for slot in range(self._slots.count)]
        tables = _input(new.graph, ROWS), _input(new.graph, PLACES)
        chosen = {"matrix": self._places[matrix], "gated": int(gated)}
        return new.op(OPERATOR, x, y, *tables, *adapters, domain=DOMAIN, **chosen)

    def _stacked(self, new: Builder, x: ir.Value, y: ir.Value, matrix: str) -> ir.Value:
        rows = _input(new.graph, ROWS)
        right, left = (
            self._widened(new, new.op("Gather", _input(new.graph, name), rows, axis=0))
            for name in stacked_names(matrix)
        )
        return new.op("Add", y, new.op("MatMul", new.op("MatMul", x, right), left))

    def _widened(self, new: Builder, value: ir.Value) -> ir.Value:
        kind = self._activations
        return value if kind == ir.DataType.FLOAT16 else new.op("Cast", value, to=int(kind))


def _input(graph: ir.Graph, name: str) -> ir.Value:
    value = graph_input(graph, name)
    assert value is not None
    return value


def _matrix_of(node: ir.Node) -> str:
    """The name of the matrix [out, in] that a product multiplies by. Empty: the node is no such product."""
    transpose = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
    weight = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
    return str(weight.name).removesuffix(".weight") if weight is not None and weight.is_initializer() else ""
