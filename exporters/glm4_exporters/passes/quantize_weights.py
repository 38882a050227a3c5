"""Replace the matrices of a lowered graph by stored parts, and their products by the target's operators."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from glm4_exporters.formats.arrangements import ROWS, UNSIGNED
from glm4_exporters.formats.base import CODES, SCALES, StoredFormat
from glm4_exporters.formats.brought import ZEROS
from glm4_exporters.formats.integers import IntegerCodes
from glm4_exporters.formats.narrow import Narrow
from glm4_exporters.passes.builder import Builder, fixed, scope_of
from glm4_exporters.passes.stored import add_dequantize, store
from glm4_runtime.bundle.graph_checks import MICROSOFT


class QuantizeWeights(ir.passes.InPlacePass):
    """Replace the matrices named in ``formats`` by stored parts.

    ``fused`` products multiply by MatMulNBits and look up by GatherBlockQuantized, where the format has blocks of
    integers. ``standard`` products, and all other formats, put DequantizeLinear in front of the product. Tables that
    no operator looks up in their stored form are not replaced: DequantizeLinear would dequantize the whole table.

    Args:
        products: a name in ``LOWERINGS``.
    """

    def __init__(self, products: str, formats: Mapping[str, StoredFormat]) -> None:
        self._lowerings, self._formats = LOWERINGS[products], dict(formats)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            weight, lower = self._lowering(node)
            if weight is None or lower is None:
                continue
            b = Builder(graph, scope_of(node))
            new = lower(b, node, weight, self._formats[str(weight.name)])
            if node.outputs[0].is_graph_output():
                new.name = node.outputs[0].name
            ir.convenience.replace_nodes_and_values(graph, node, [node], b.nodes, node.outputs, [new])
            modified = True
        for name in self._formats:
            weight = graph.initializers.get(name)
            if weight is not None and not weight.uses():
                graph.initializers.pop(name)
        if any(node.domain == MICROSOFT for node in graph):
            model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified)

    def _lowering(self, node: ir.Node) -> "tuple[ir.Value | None, _Lower | None]":
        """The matrix that a node reads, and the function that replaces the node; (None, None) if the node
        stays."""
        for row in self._lowerings:
            if (node.domain, node.op_type) == row.operator:
                weight = node.inputs[row.matrix]
                form = self._formats.get(str(weight.name)) if weight is not None else None
                if weight is not None and form is not None and row.takes(form, _shape(weight)[1]):
                    return weight, row.lower
        return None, None


def _block_product(b: Builder, node: ir.Node, weight: ir.Value, form: StoredFormat) -> ir.Value:
    """FusedMatMul by a weight [N, K] -> MatMulNBits."""
    assert isinstance(form, IntegerCodes)
    assert form.block is not None
    parts = store(b.graph, weight, form, UNSIGNED)
    rows, width = _shape(weight)
    return b.op(
        "MatMulNBits",
        *(node.inputs[0], parts[CODES], _in_type_of(b, weight, parts[SCALES])),
        *([parts[ZEROS]] if ZEROS in parts else []),
        domain=MICROSOFT,
        K=width,
        N=rows,
        bits=form.bits,
        block_size=form.block,
        accuracy_level=4,
    )


def _lookup(b: Builder, node: ir.Node, weight: ir.Value, form: StoredFormat) -> ir.Value:
    """Gather from a table [V, K] -> GatherBlockQuantized."""
    assert isinstance(form, IntegerCodes)
    assert form.block is not None
    parts = store(b.graph, weight, form, UNSIGNED, as_table=True)
    return b.op(
        "GatherBlockQuantized",
        *(parts[CODES], node.inputs[1], _in_type_of(b, weight, parts[SCALES])),
        domain=MICROSOFT,
        gather_axis=0,
        quantize_axis=1,
        block_size=form.block,
        bits=form.bits,
    )


def _dequantized_product(b: Builder, node: ir.Node, weight: ir.Value, form: StoredFormat) -> ir.Value:
    """FusedMatMul by a weight [N, K] -> DequantizeLinear, Transpose, MatMul."""
    return b.op("MatMul", node.inputs[0], _dequantized(b, node, weight, form))


def _dequantized(b: Builder, _node: ir.Node, weight: ir.Value, form: StoredFormat) -> ir.Value:
    """Transpose of a weight [N, K] -> DequantizeLinear, Transpose."""
    wide = add_dequantize(b, weight, form, store(b.graph, weight, form, ROWS))
    return b.op("Transpose", wide, perm=[1, 0])


def _widened(b: Builder, node: ir.Node, weight: ir.Value, form: StoredFormat) -> ir.Value:
    """FusedMatMul by a weight [N, K], or its Transpose -> the same of a Cast. ONNX Runtime casts while it loads."""
    inputs = [
        add_dequantize(b, weight, form, store(b.graph, weight, form, ROWS)) if value is weight else value
        for value in node.inputs
    ]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return b.op(node.op_type, *inputs, domain=node.domain, **attributes)


def _widened_lookup(b: Builder, node: ir.Node, weight: ir.Value, form: StoredFormat) -> ir.Value:
    """Gather from a table [V, K] -> Gather, and a Cast of the rows."""
    assert weight.dtype is not None
    rows = b.op("Gather", store(b.graph, weight, form, ROWS)[CODES], node.inputs[1], axis=0)
    rows.name = f"{weight.name}.rows"  # the Cast's result takes the name of the old Gather's
    return b.op("Cast", rows, to=int(weight.dtype))


def _is_narrow(form: StoredFormat, _width: int) -> bool:
    return isinstance(form, Narrow)


def _in_blocks(form: StoredFormat, _width: int) -> bool:
    return isinstance(form, IntegerCodes) and form.block is not None


def _in_whole_blocks(form: StoredFormat, width: int) -> bool:
    """Whether every row is a multiple of the block; if not, a tied table is looked up unquantized."""
    return _in_blocks(form, width) and width % (form.block or 1) == 0


def _any(_form: StoredFormat, _width: int) -> bool:
    return True


_Lower = Callable[[Builder, ir.Node, ir.Value, StoredFormat], ir.Value]


@dataclass(frozen=True)
class _Row:
    """A rule that replaces an operator.

    Attributes:
        operator: domain and name.
        matrix: index of the input that is the matrix.
        takes: whether the new operator can read the format, for rows of this width.
    """

    operator: tuple[str, str]
    matrix: int
    takes: Callable[[StoredFormat, int], bool]
    lower: _Lower


# Matrices that are not quantized, for all products.
_NARROW = (
    _Row((MICROSOFT, "FusedMatMul"), 1, _is_narrow, _widened),
    _Row(("", "Transpose"), 0, _is_narrow, _widened),
    _Row(("", "Gather"), 0, _is_narrow, _widened_lookup),
)
# By the name of a target's products. The first row that accepts the node and its format is used.
LOWERINGS = {
    "fused": (
        *_NARROW,
        _Row((MICROSOFT, "FusedMatMul"), 1, _in_blocks, _block_product),
        _Row((MICROSOFT, "FusedMatMul"), 1, _any, _dequantized_product),
        _Row(("", "Gather"), 0, _in_whole_blocks, _lookup),
    ),
    "standard": (*_NARROW, _Row(("", "Transpose"), 0, _any, _dequantized)),
}


def _shape(weight: ir.Value) -> tuple[int, int]:
    assert weight.shape is not None
    return fixed(weight.shape[0]), fixed(weight.shape[1])


def _in_type_of(b: Builder, weight: ir.Value, scales: ir.Value) -> ir.Value:
    """Scales cast to the weight's type, as these operators require."""
    assert weight.dtype is not None
    return scales if scales.dtype == weight.dtype else b.op("Cast", scales, to=int(weight.dtype))
