"""Replace a product whose result is split by one product per part, for engines with several profiles.

TensorRT-RTX 1.7 changes the layout of the fused gate and up weights for one of two profiles, and stores both layouts.
Four layers of the 9B's widths took 5.0 GB for 4.1 GB of weights. Separate parts are stored once.
"""

import onnx_ir as ir

from glm4_exporters.passes.builder import Builder, fixed, scope_of


class SplitProducts(ir.passes.InPlacePass):
    """Compute each output of a Split by a separate product, from its rows of the weight and of the weight's scales.

    A part is a range of rows in the data file, so nothing is written again.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for split in list(graph):
            joined = split.inputs[0] if split.op_type == "Split" else None
            product = joined.producer() if joined is not None else None
            if joined is None or product is None or product.op_type != "MatMul" or product.inputs[1] is None:
                continue
            transpose = product.inputs[1].producer()
            if transpose is not None and transpose.op_type == "Transpose" and len(joined.uses()) == 1:
                _split(graph, split, product, transpose)
                modified = True
        if modified:
            for name in [n for n, value in graph.initializers.items() if not value.uses()]:
                graph.initializers.pop(name)
        return ir.passes.PassResult(model, modified)


def _split(graph: ir.Graph, split: ir.Node, product: ir.Node, transpose: ir.Node) -> None:
    weight = transpose.inputs[0]
    assert weight is not None
    sizes = ir.convenience.get_const_tensor(split.inputs[1]) if split.inputs[1] is not None else None
    assert sizes is not None
    start = 0
    for part, (output, count) in enumerate(zip(split.outputs, sizes.numpy().tolist(), strict=True)):
        b = Builder(graph, f"{scope_of(product)}.{part}")
        taken = _taken(b, weight, slice(start, start + count), part)
        result = b.op("MatMul", product.inputs[0], b.op("Transpose", taken, perm=[1, 0]))
        graph.insert_before(split, b.nodes)
        ir.convenience.replace_all_uses_with(output, result)
        start += count
    graph.remove([split, product, transpose, *_dequantizers(weight)], safe=True)


def _taken(b: Builder, value: ir.Value, rows: slice, part: int) -> ir.Value:
    """Rows of a weight, or of the nodes that dequantize and cast it; its scales may be dequantized too."""
    maker = value.producer()
    if maker is None:
        return _rows(b.graph, value, rows.start, rows.stop - rows.start, part)
    taken = b.op(maker.op_type, *(x and _taken(b, x, rows, part) for x in maker.inputs))
    taken.producer().attributes.update(maker.attributes)  # type: ignore[union-attr]
    return taken


def _dequantizers(value: ir.Value | None) -> list[ir.Node]:
    """The nodes that dequantize a weight, from the last to the first."""
    node = value.producer() if value is not None else None
    return [] if node is None else [node, *(inner for x in node.inputs for inner in _dequantizers(x))]


def _rows(graph: ir.Graph, value: ir.Value, start: int, count: int, part: int) -> ir.Value:
    """Some rows of an initializer from ``start`` on, as a new initializer."""
    whole = value.const_value
    assert whole is not None
    assert value.shape is not None
    if not value.shape:  # one scale for the whole weight
        return value
    shape = ir.Shape([count, *(fixed(axis) for axis in list(value.shape)[1:])])
    name = f"{value.name}.{part}"
    if isinstance(whole, ir.ExternalTensor):
        assert whole.length is not None
        row_bytes = whole.length // fixed(value.shape[0])
        offset = (whole.offset or 0) + start * row_bytes
        place = whole.location, offset, count * row_bytes, whole.dtype
        rows: ir.TensorProtocol = ir.ExternalTensor(*place, shape=shape, name=name, base_dir=whole.base_dir)
    else:
        rows = ir.tensor(whole.numpy()[start : start + count], dtype=whole.dtype, name=name)
    made = ir.Value(name=name, type=ir.TensorType(whole.dtype), shape=shape, const_value=rows)
    graph.register_initializer(made)
    return made
