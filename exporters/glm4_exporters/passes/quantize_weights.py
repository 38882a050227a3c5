"""Matrices of a lowered graph -> integers and scales, by the operators that each dialect has for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from glm4_exporters.passes.builder import MICROSOFT, Builder, fixed, scope_of
from glm4_exporters.quantize.schemes import SIGNED, UNSIGNED, Scheme

CODES, SCALES = "codes", "scales"


@dataclass(frozen=True)
class Source:
    """What a quantized initializer is made from; ``layout`` and the writer read it from ``value.meta``.

    Attributes:
        tensor: canonical name of the matrix.
        part: ``codes`` or ``scales``.
        layout: how the numbers and scales lie, a row of ``blocks.LAYOUTS``.
        scale_type: what the scales are stored as.
    """

    tensor: str
    part: str
    scheme: Scheme
    layout: str
    scale_type: ir.DataType


class QuantizeWeights(ir.passes.InPlacePass):
    """Replace the matrices named in ``schemes`` by stored integers.

    ``ort`` multiplies by MatMulNBits and looks up by GatherBlockQuantized, both with their zero in the
    middle of the unsigned numbers; a matrix with one scale per row it stores as ``native`` does. ``native`` puts DequantizeLinear in front of the product, with signed
    numbers and no zero points, which TensorRT reads; its lookups stay as they are, since a whole table
    would be dequantized for each.
    """

    def __init__(self, dialect: str, schemes: Mapping[str, Scheme]) -> None:
        self._operators, self._schemes = _OPERATORS[dialect], dict(schemes)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in list(graph):
            at, lower = self._operators.get((node.domain, node.op_type), (0, None))
            weight = node.inputs[at] if lower else None
            if weight is None or not weight.is_initializer() or weight.name not in self._schemes:
                continue
            b = Builder(graph, scope_of(node))
            assert lower is not None
            scheme = self._schemes[weight.name]
            if lower is _lookup and _shape(weight)[1] % (scheme.block or 1):
                continue  # a tied table whose rows are no whole blocks is looked up as it is
            lower(b, node, weight, scheme)
            new = b.nodes[-1].outputs[0]
            if node.outputs[0].is_graph_output():
                new.name = node.outputs[0].name
            ir.convenience.replace_nodes_and_values(graph, node, [node], b.nodes, node.outputs, [new])
            modified = True
        for name in self._schemes:
            weight = graph.initializers.get(name)
            if weight is not None and not weight.uses():
                graph.initializers.pop(name)
        if any(node.domain == MICROSOFT for node in graph):
            model.opset_imports[MICROSOFT] = 1
        return ir.passes.PassResult(model, modified)


def _product(b: Builder, node: ir.Node, weight: ir.Value, scheme: Scheme) -> None:
    """FusedMatMul by a weight [N, K] -> MatMulNBits; by one scale per row -> DequantizeLinear, Transpose, MatMul."""
    if scheme.block is None:
        _dequantized(b, node, weight, scheme)
        b.op("MatMul", node.inputs[0], b.nodes[-1].outputs[0])
        return
    rows, width = _shape(weight)
    b.op(
        "MatMulNBits",
        node.inputs[0],
        stored(b.graph, weight, CODES, scheme, (rows, scheme.blocks(width), scheme.block * scheme.bits // 8)),
        _scales(b, weight, scheme),
        domain=MICROSOFT,
        K=width,
        N=rows,
        bits=scheme.bits,
        block_size=scheme.block,
        accuracy_level=4,
    )


def _lookup(b: Builder, node: ir.Node, weight: ir.Value, scheme: Scheme) -> None:
    """Gather from a table [V, K] -> GatherBlockQuantized."""
    rows, width = _shape(weight)
    assert scheme.block is not None
    assert width % scheme.block == 0
    b.op(
        "GatherBlockQuantized",
        stored(b.graph, weight, CODES, scheme, (rows, width * scheme.bits // 8), suffix=".table"),
        node.inputs[1],
        _scales(b, weight, scheme),
        domain=MICROSOFT,
        gather_axis=0,
        quantize_axis=1,
        block_size=scheme.block,
        bits=scheme.bits,
    )


def _dequantized(b: Builder, _node: ir.Node, weight: ir.Value, scheme: Scheme) -> None:
    """Transpose of a weight [N, K] -> DequantizeLinear, Transpose."""
    rows, width = _shape(weight)
    codes = stored(b.graph, weight, CODES, scheme, (rows, width), layout=SIGNED)
    # Block size 0 is the standard's word for one scale per index of the axis.
    axis, size = (0, 0) if scheme.block is None else (1, scheme.block)
    wide = b.op("DequantizeLinear", codes, _scales(b, weight, scheme), axis=axis, block_size=size)
    assert weight.dtype is not None
    wide.dtype, wide.shape = weight.dtype, weight.shape
    b.op("Transpose", wide, perm=[1, 0])


_Lowering = Callable[[Builder, ir.Node, ir.Value, Scheme], None]

# Per dialect and operator: which input is the matrix, and what takes the operator's place.
_OPERATORS: dict[str, dict[tuple[str, str], tuple[int, _Lowering]]] = {
    "ort": {(MICROSOFT, "FusedMatMul"): (1, _product), ("", "Gather"): (0, _lookup)},
    "native": {("", "Transpose"): (0, _dequantized)},
}
_OPERATORS["cpu"] = _OPERATORS["ort"]  # of what PackedProducts left


def _shape(weight: ir.Value) -> tuple[int, int]:
    assert weight.shape is not None
    return fixed(weight.shape[0]), fixed(weight.shape[1])


def _scales(b: Builder, weight: ir.Value, scheme: Scheme) -> ir.Value:
    """Scales [rows, blocks] in the weight's type."""
    rows, width = _shape(weight)
    shape = (rows,) if scheme.block is None else (rows, scheme.blocks(width))
    scales = stored(b.graph, weight, SCALES, scheme, shape)
    return scales if scales.dtype == weight.dtype else b.op("Cast", scales, to=int(weight.dtype or 0))


def scale_type(activations: ir.DataType) -> ir.DataType:
    """bfloat16 for float32: a scale needs its range, and no more digits than the numbers under it."""
    return ir.DataType.BFLOAT16 if activations == ir.DataType.FLOAT else activations


def stored(
    graph: ir.Graph,
    weight: ir.Value,
    part: str,
    scheme: Scheme,
    shape: tuple[int, ...],
    *,
    suffix: str = "",
    layout: str = UNSIGNED,
) -> ir.Value:
    """The initializer for one part of a weight; the same one for whoever asks again."""
    name = f"{weight.name}.{part}{suffix}"
    if name not in graph.initializers:
        assert weight.dtype is not None
        of_scales = scale_type(weight.dtype)
        signed = {8: ir.DataType.INT8, 4: ir.DataType.INT4}[scheme.bits]
        of_codes = signed if layout == SIGNED else ir.DataType.UINT8
        kind = ir.TensorType(of_scales if part == SCALES else of_codes)
        value = ir.Value(name=name, type=kind, shape=ir.Shape(shape))
        value.meta["source"] = Source(str(weight.name), part, scheme, layout, of_scales)
        graph.initializers[name] = value  # its data is written later
    return graph.initializers[name]
