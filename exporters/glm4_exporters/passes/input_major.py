"""int8 weights lie [in, out] in their file, as TensorRT-RTX multiplies them, so that its builder copies none.

    w [out, in] int8 -> DequantizeLinear(axis 0) -> Transpose -> MatMul
    w [in, out] int8 -> DequantizeLinear(axis 1) -> MatMul

TensorRT-RTX 1.7 holds the whole engine and every weight that it laid out anew at once. Four layers of the 9B's widths,
an engine of 2.69 GB, took 4.32 GB of anonymous memory with each weight [out, in], and 3.02 GB so; the 9B took 20.9 GB
and 12.2 GB. Of gate and up as one product it then stores one copy for both profiles, which need no SplitProducts.
"""

from pathlib import Path

import onnx_ir as ir
import torch

from glm4_exporters.passes.builder import fixed

BLOCK_ROWS = 512  # of the new order, written at once: the head's in 78 MB beside the 621 MB that were read


class InputMajor(ir.passes.InPlacePass):
    """Transpose int8 weights in the file they lie in, and drop the Transpose behind their DequantizeLinear.

    Products of one input keep theirs: TensorRT-RTX joins such weights [in, out] for the prefill's profile alone, and
    stores both forms (3.21 GB in place of 2.69).

    Args:
        folder: where the data file lies.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if _is_alone(node) and _weight_of(node) is not None]
        for product in found:
            _transpose(model.graph, product, self.folder)
        return ir.passes.PassResult(model, bool(found))


def _is_alone(node: ir.Node) -> bool:
    """Is this a product, and the only one that reads its input?"""
    if node.op_type != "MatMul" or node.inputs[0] is None:
        return False
    return sum(reader.op_type == "MatMul" for reader, _ in node.inputs[0].uses()) == 1


def _weight_of(product: ir.Node) -> ir.Value | None:
    """The int8 matrix [out, in] in a data file that nothing but this product reads, a scale per row."""
    value = product.inputs[1]
    for operator in ("Transpose", "DequantizeLinear"):
        node = value.producer() if value is not None and len(value.uses()) == 1 else None
        if node is None or node.op_type != operator:
            return None
        value = node.inputs[0]
    assert node is not None
    per_row = node.attributes.get_int("axis", 1) == 0 and node.attributes.get_int("block_size", 0) == 0
    if value is None or not per_row or len(value.uses()) != 1:
        return None
    stored = value.const_value
    return value if isinstance(stored, ir.ExternalTensor) and stored.dtype == ir.DataType.INT8 else None


def _transpose(graph: ir.Graph, product: ir.Node, folder: Path) -> None:
    weight, wide = _weight_of(product), product.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    assert wide is not None
    transpose = wide.producer()
    assert transpose is not None
    dequantized = transpose.inputs[0]
    assert dequantized is not None
    dequantize = dequantized.producer()
    assert dequantize is not None
    rows, columns = (fixed(axis) for axis in weight.shape)
    stored = weight.const_value
    assert isinstance(stored, ir.ExternalTensor)
    _rewrite(folder / stored.location, stored.offset or 0, rows, columns)
    shape = ir.Shape([columns, rows])
    place = stored.location, stored.offset, stored.length, stored.dtype
    weight.const_value = ir.ExternalTensor(*place, shape=shape, name=stored.name, base_dir=stored.base_dir)
    weight.shape = shape
    dequantize.attributes["axis"] = ir.AttrInt64("axis", 1)
    if dequantized.shape is not None:
        dequantized.shape = shape
    ir.convenience.replace_all_uses_with(wide, dequantized)
    graph.remove(transpose, safe=True)


def _rewrite(path: Path, offset: int, rows: int, columns: int) -> None:
    """Overwrite a matrix of bytes by its transpose."""
    buffer = bytearray(rows * columns)
    whole = torch.frombuffer(buffer, dtype=torch.int8).view(rows, columns)
    with path.open("r+b") as file:
        file.seek(offset)
        file.readinto(buffer)
        file.seek(offset)
        for start in range(0, columns, BLOCK_ROWS):
            file.write(whole[:, start : start + BLOCK_ROWS].t().contiguous().numpy().data)
