"""Helpers of passes: a builder whose new nodes and constants follow the graph's naming."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class Builder:
    """Collects new nodes of one module, until the pass inserts them into the graph."""

    def __init__(self, graph: ir.Graph, scope: str, prefix: str = "") -> None:
        """``prefix``: before the operator in each name, where the module has nodes of the same operators."""
        self.graph, self.scope, self._prefix = graph, scope, prefix
        self.nodes: list[ir.Node] = []
        self._used: dict[str, int] = {}

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int = 1,
        domain: str = "",
        **attributes: int | float | str | list[int],
    ) -> ir.Value:
        """Add a node and return its first output; the others are at ``self.nodes[-1].outputs``."""
        self._used[op_type] = self._used.get(op_type, 0) + 1
        name = f"{self.scope}/{self._prefix}{op_type}" + (
            f"_{self._used[op_type]}" if self._used[op_type] > 1 else ""
        )
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}:{i}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: int | list[int], dtype: npt.DTypeLike = np.int64) -> ir.Value:
        """A small constant, as an initializer with data; equal constants share one."""
        array = np.asarray(value, dtype)
        name = "constant." + "_".join(map(str, array.reshape(-1).tolist())) + f".{array.dtype}.{array.ndim}"
        return self.named(name, array)

    def named(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """An initializer with data; its name tells its value."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.ascontiguousarray(array) if array.ndim else array, name=name)
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
            self.graph.register_initializer(ir.Value(name=name, type=kind, shape=shape, const_value=tensor))
        return self.graph.initializers[name]


def graph_input(graph: ir.Graph, name: str) -> ir.Value | None:
    return next((value for value in graph.inputs if value.name == name), None)


def fixed(axis: int | ir.SymbolicDim) -> int:
    """An axis that has a number."""
    assert isinstance(axis, int), f"axis {axis} is symbolic"
    return axis


def scope_of(node: ir.Node) -> str:
    """The module a node came from: ``model.layers.3.self_attn`` of ``model.layers.3.self_attn/MatMul``."""
    return str(node.name).rpartition("/")[0]
