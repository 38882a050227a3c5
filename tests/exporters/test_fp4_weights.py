"""NVFP4 matrices: their numbers, and the form of the graph that only TensorRT's parser reads."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from glm4_exporters.engine.graph_file import save_graphs
from glm4_exporters.formats import FORMATS
from glm4_exporters.formats.nvfp4 import doubled, total_scale
from glm4_exporters.passes.fp4_weights import CODE_OF, Fp4Weights

FORM = FORMATS["nvfp4"]
FLOATS = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def encoded(rows, scale_type=torch.float16):
    return FORM.encode(rows, scale_type, largest=float(rows.abs().max()))


def test_each_number_becomes_the_nearest_4_bit_float():
    values = torch.linspace(-14, 14, 10001)
    distances = (values[:, None] - 2 * torch.from_numpy(FLOATS)).abs()
    assert ((doubled(values) - values).abs() == distances.amin(1)).all()
    assert set(doubled(values).tolist()) == set((2 * FLOATS).tolist())


def test_codes_of_the_parser_are_half_the_stored_integers():
    numbers = (2 * FLOATS).astype(np.int8)
    assert (FLOATS[CODE_OF[numbers.view(np.uint8)]] == numbers / 2).all()


@pytest.mark.parametrize("size", [1e-7, 0.02, 1.0, 300.0])
@pytest.mark.parametrize("scale_type", [torch.float16, torch.bfloat16])
def test_every_weight_is_exact_in_16_bits(size, scale_type):
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * size
    parts = encoded(rows, scale_type)
    values = FORM.decode(parts, 64)
    scales = parts["scales"].to(scale_type) * parts["total"]
    narrow = parts["codes"].to(scale_type) * scales.repeat_interleave(16, 1)
    assert (scales > 0).all()
    if size >= 0.02:  # smaller products leave float16's normal numbers
        assert (narrow.float() == values).all()
        assert ((values - rows).norm() / rows.norm()).item() < 0.1


def test_a_block_takes_the_better_of_two_scales():
    """A block of 4 and 3 is exact with a largest number of 4, and a block of 6 and 1 with 6."""
    rows = torch.tensor([[4.0, 3.0] * 8 + [6.0, 1.0] * 8])
    values = FORM.decode(encoded(rows), 32)
    assert (values == rows).all()


def test_a_matrix_of_zeros_has_scales():
    parts = encoded(torch.zeros(2, 32))
    assert parts["total"] == total_scale(0.0) == 2.0**-14
    assert (parts["scales"].float() > 0).all()
    assert not FORM.decode(parts, 32).any()


def value(name, array):
    tensor = ir.tensor(array, name=name)
    return ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
    )


@pytest.fixture
def model():
    """A graph of one NVFP4 matrix [4, 32], as the bundle has it."""
    parts = encoded(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)))
    scales = parts["scales"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    arrays = {"w.codes": parts["codes"].numpy(), "w.scales": scales, "w.total": parts["total"].numpy()}
    codes, scale, total = (value(name, array) for name, array in arrays.items())
    inner = ir.node("DequantizeLinear", [scale, total], name="inner")
    outer = ir.node(
        "DequantizeLinear", [codes, inner.outputs[0]], {"axis": 1, "block_size": 16}, name="outer"
    )
    outer.outputs[0].name = "y"
    graph = ir.Graph(
        [], outer.outputs, nodes=[inner, outer], initializers=[codes, scale, total], opset_imports={"": 24}
    )
    return ir.Model(graph, ir_version=11), FORM.decode(parts, 32).numpy()


def test_the_parser_gets_4_bit_floats_of_the_same_values(model, tmp_path):
    graph, values = model
    assert Fp4Weights()(graph).modified
    assert not Fp4Weights()(graph).modified
    save_graphs({"a.onnx": graph, "b.onnx": graph.clone()}, tmp_path, "data")
    found = {name: x.const_value for name, x in ir.load(tmp_path / "a.onnx").graph.initializers.items()}
    assert set(found) == {"w.codes.float4", "w.scales", "w.total.double"}
    codes, total = found["w.codes.float4"], found["w.total.double"].numpy()
    assert (codes.dtype, codes.offset % 4096, codes.length) == (ir.DataType.FLOAT4E2M1, 0, 64)
    assert (tmp_path / "data").stat().st_size < 3 * 4096  # two graphs share it
    scales = found["w.scales"].numpy().astype(np.float32) * np.float32(total)
    assert (codes.numpy().astype(np.float32) * scales.repeat(16, 1) == values).all()


def test_graphs_without_narrow_weights_have_no_file_of_their_own(tmp_path):
    save_graphs({"a.onnx": ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)}, tmp_path, "data")
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx"}
