"""Integer weights lie [in, out] in their file, as TensorRT-RTX multiplies them, so that its builder copies none.

    w [out, in] int8 -> DequantizeLinear(axis 0) -> Transpose -> MatMul
    w [in, out] int8 -> DequantizeLinear(axis 1) -> MatMul

and int4 with its scales [out, in / block] -> [in / block, out], the blocks on axis 0 in place of 1.

TensorRT-RTX 1.7 holds the whole engine and every weight that it laid out anew at once. Four layers of the 9B's widths
took 4.32 GB of anonymous memory for an engine of 2.69 GB in int8, and 3.02 GB so; 4.51 GB for one of 2.33 GB in int4,
and 3.04 GB. Of gate and up as one product it then stores one copy for both profiles, which need no SplitProducts.
"""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from glm4_exporters.passes.builder import fixed

BLOCK_ROWS = 512  # of the new order, written at once: the head's in 78 MB beside the 621 MB that were read
AXES = {ir.DataType.INT8: (0, 1), ir.DataType.INT4: (1, 0)}  # of the scales, before and after
ELEMENTS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes


@dataclass(frozen=True)
class _Weight:
    """What lies behind a product's second input."""

    transpose: ir.Node
    dequantize: ir.Node
    values: tuple[ir.Value, ...]  # matrices to transpose: codes [out, in], and scales that are in blocks


class InputMajor(ir.passes.InPlacePass):
    """Transpose integer weights in the file they lie in, and drop the Transpose behind their DequantizeLinear.

    Products of one input keep theirs: TensorRT-RTX joins such weights [in, out] for the prefill's profile alone, and
    stores both forms (3.21 GB in place of 2.69).

    Args:
        folder: where the data file lies.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [weight for node in model.graph if _is_alone(node) and (weight := _weight_of(node))]
        for weight in found:
            for value in weight.values:
                _transpose(value, self.folder)
            _drop_transpose(model.graph, weight)
        return ir.passes.PassResult(model, bool(found))


def _is_alone(node: ir.Node) -> bool:
    """Is this a product, and the only one that reads its input?"""
    if node.op_type != "MatMul" or node.inputs[0] is None:
        return False
    return sum(reader.op_type == "MatMul" for reader, _ in node.inputs[0].uses()) == 1


def _weight_of(product: ir.Node) -> _Weight | None:
    """int8 with a scale per row, or int4 in blocks, that lies in a data file and that only this product reads."""
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
    values = (codes, scales) if in_blocks else (codes,)
    if not all(isinstance(v.const_value, ir.ExternalTensor) and len(v.uses()) == 1 for v in values):
        return None
    assert codes.shape is not None
    if in_blocks and any(fixed(axis) % 2 for axis in codes.shape):  # rows of half a byte's length
        return None
    return _Weight(transpose, dequantize, values)


def _maker(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node of ``operator`` that makes a value for one reader."""
    node = value.producer() if value is not None and len(value.uses()) == 1 else None
    return node if node is not None and node.op_type == operator else None


def _drop_transpose(graph: ir.Graph, weight: _Weight) -> None:
    codes, wide = weight.values[0], weight.dequantize.outputs[0]
    assert codes.dtype is not None
    weight.dequantize.attributes["axis"] = ir.AttrInt64("axis", AXES[codes.dtype][1])
    if wide.shape is not None:
        wide.shape = codes.shape
    ir.convenience.replace_all_uses_with(weight.transpose.outputs[0], wide)
    graph.remove(weight.transpose, safe=True)


def _transpose(value: ir.Value, folder: Path) -> None:
    """Overwrite a matrix by its transpose."""
    stored = value.const_value
    assert isinstance(stored, ir.ExternalTensor)
    assert value.shape is not None
    rows, columns = (fixed(axis) for axis in value.shape)
    size = stored.nbytes
    buffer = bytearray(size)
    packed = stored.dtype == ir.DataType.INT4
    element = torch.uint8 if packed else ELEMENTS[size // (rows * columns)]
    whole = torch.frombuffer(buffer, dtype=element).view(rows, -1)
    with (folder / stored.location).open("r+b") as file:
        file.seek(stored.offset or 0)
        file.readinto(buffer)
        file.seek(stored.offset or 0)
        step = BLOCK_ROWS // 2 if packed else BLOCK_ROWS
        for start in range(0, whole.shape[1], step):
            block = whole[:, start : start + step]
            turned = _turned_nibbles(block) if packed else block.t().contiguous()
            file.write(turned.numpy().data)
    value.shape = ir.Shape([columns, rows])
    place = stored.location, stored.offset, stored.length, stored.dtype
    value.const_value = ir.ExternalTensor(
        *place, shape=value.shape, name=stored.name, base_dir=stored.base_dir
    )


def _turned_nibbles(block: torch.Tensor) -> torch.Tensor:
    """The transpose of a matrix of two columns a byte, the first of them in the low bits."""
    columns = block.t().contiguous()
    pairs = torch.stack((columns & 15, columns >> 4), dim=1)  # [in / 2, 2, out]
    return pairs[..., 0::2] | (pairs[..., 1::2] << 4)
