"""Store integer weights as [in, out], which TensorRT-RTX multiplies directly, so that its builder copies none.

    w [out, in] int8 -> DequantizeLinear(axis 0) -> Transpose -> MatMul
    w [in, out] int8 -> DequantizeLinear(axis 1) -> MatMul

and int4 with its scales [out, in / block] -> [in / block, out], the blocks on axis 0 in place of 1.

During a build, TensorRT-RTX 1.7 keeps the whole engine in memory, and also every weight whose layout it changed.
Measured with four layers of the 9B's widths, anonymous memory for [out, in] and for [in, out]:

    int8   engine of 2.69 GB   4.32 and 3.02 GB
    int4   engine of 2.33 GB   4.51 and 3.04 GB

With [in, out], both profiles share one copy of gate and up as one product, so SplitProducts is not needed for them.
"""

from dataclasses import dataclass, replace

import onnx_ir as ir

from glm4_exporters.formats.arrangements import COLUMNS, ROWS
from glm4_exporters.passes.builder import fixed
from glm4_exporters.passes.stored import Source, source_of

AXES = {ir.DataType.INT8: (0, 1), ir.DataType.INT4: (1, 0)}  # of the scales, before and after


@dataclass(frozen=True)
class _Weight:
    """The nodes that produce a product's second input."""

    transpose: ir.Node
    dequantize: ir.Node
    parts: tuple[ir.Value, ...]  # codes [out, in], and scales


class InputMajor(ir.passes.InPlacePass):
    """Choose the transposed arrangement for integer weights, and drop the Transpose behind their DequantizeLinear.

    Runs before the data file is laid out. Products that share an input keep [out, in]: TensorRT-RTX would join
    their [in, out] weights for the prefill profile only, and store both forms (3.21 GB instead of 2.69).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [weight for node in model.graph if _is_alone(node) and (weight := _weight_of(node))]
        for weight in found:
            for value in weight.parts:
                _turn(value)
            _drop_transpose(model.graph, weight)
        return ir.passes.PassResult(model, bool(found))


def _is_alone(node: ir.Node) -> bool:
    """Whether this is a product, and the only reader of its input."""
    if node.op_type != "MatMul" or node.inputs[0] is None:
        return False
    return sum(reader.op_type == "MatMul" for reader, _ in node.inputs[0].uses()) == 1


def _weight_of(product: ir.Node) -> _Weight | None:
    """A weight that only this product reads: int8 with a scale per row, or int4 in blocks. None otherwise."""
    transpose = _maker(product.inputs[1], "Transpose")
    dequantize = transpose and _maker(transpose.inputs[0], "DequantizeLinear")
    if transpose is None or dequantize is None or len(dequantize.inputs) != 2:
        return None
    codes, scales = dequantize.inputs
    assert codes is not None
    assert scales is not None
    if codes.dtype not in AXES or dequantize.attributes.get_int("axis", 1) != AXES[codes.dtype][0]:
        return None
    in_blocks = dequantize.attributes.get_int("block_size", 0) != 0
    if in_blocks != (codes.dtype == ir.DataType.INT4):
        return None
    sources = [source_of(value) for value in (codes, scales)]
    if any(source is None or source.matrix.arrangement != ROWS for source in sources):
        return None
    if any(len(value.uses()) != 1 for value in (codes, scales)):
        return None
    assert codes.shape is not None
    if in_blocks and any(fixed(axis) % 2 for axis in codes.shape):  # rows of half a byte's length
        return None
    return _Weight(transpose, dequantize, (codes, scales))


def _maker(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node of ``operator`` that makes a value for one reader."""
    node = value.producer() if value is not None and len(value.uses()) == 1 else None
    return node if node is not None and node.op_type == operator else None


def _turn(value: ir.Value) -> None:
    """Store the transpose."""
    source = source_of(value)
    assert source is not None
    turned = Source(replace(source.matrix, arrangement=COLUMNS), source.part)
    value.meta["source"] = turned
    value.shape = ir.Shape(turned.matrix.stored(turned.part).shape)


def _drop_transpose(graph: ir.Graph, weight: _Weight) -> None:
    codes, wide = weight.parts[0], weight.dequantize.outputs[0]
    assert codes.dtype is not None
    weight.dequantize.attributes["axis"] = ir.AttrInt64("axis", AXES[codes.dtype][1])
    if wide.shape is not None:
        wide.shape = codes.shape
    ir.convenience.replace_all_uses_with(weight.transpose.outputs[0], wide)
    graph.remove(weight.transpose, safe=True)
