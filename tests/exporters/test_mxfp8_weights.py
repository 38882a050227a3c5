"""MXFP8 matrices: their numbers, and the form of the graph that only TensorRT's parser reads."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from glm4_exporters.formats import FORMATS
from glm4_exporters.passes.mxfp8_weights import Mxfp8Weights

FORM = FORMATS["mxfp8"]


@pytest.mark.parametrize("scale_type", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0.02, 1.0, 300.0])
def test_scales_are_powers_of_two_and_weights_exact_in_16_bits(size, scale_type):
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * size
    parts = FORM.encode(rows, scale_type)
    assert (torch.frexp(parts["scales"].float())[0] == 0.5).all()
    values = FORM.decode(parts, 64)
    narrow = parts["codes"].to(scale_type) * parts["scales"].repeat_interleave(32, 1)
    assert (narrow.float() == values).all()
    assert ((values - rows).norm() / rows.norm()).item() < 0.03


def test_a_block_that_is_clipped_a_little_is_exact_elsewhere():
    """449 is clipped to 448. The other numbers are exact only with a scale of 1."""
    row = torch.tensor([[449.0] + [2.0**-9] * 31])
    assert FORM.decode(FORM.encode(row, torch.float16), 32)[0, 0] in (448.0, 512.0 * 7 / 8)
    assert (FORM.decode(FORM.encode(row[:, 1:].repeat(1, 2)[:, :32], torch.float16), 32) == 2.0**-9).all()


def test_a_matrix_of_zeros_has_scales():
    parts = FORM.encode(torch.zeros(2, 32), torch.float16)
    assert (parts["scales"] == 2.0**-14).all()
    assert not FORM.decode(parts, 32).any()


def test_the_parser_gets_the_exponents_as_bytes():
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    parts = FORM.encode(rows, torch.float16)
    codes = parts["codes"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    arrays = {"w.codes": codes, "w.scales": parts["scales"].numpy()}
    values = [
        ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        for name, array in arrays.items()
        for tensor in [ir.tensor(array, name=name)]
    ]
    node = ir.node("DequantizeLinear", values, {"axis": 1, "block_size": 32}, name="layer/DequantizeLinear")
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 24})
    model = ir.Model(graph, ir_version=11)
    assert Mxfp8Weights()(model).modified
    assert not Mxfp8Weights()(model).modified
    (new,) = model.graph
    assert (new.domain, new.op_type, new.name) == ("trt", "TRT_MXFP8DequantizeLinear", node.name)
    assert {k: a.value for k, a in new.attributes.items()} == {
        "axis": -1,
        "block_size": 32,
        "output_dtype": 10,
    }
    exponents = model.graph.initializers["w.scales.exponents"].const_value.numpy()
    assert exponents.dtype == np.uint8
    assert (2.0 ** (exponents.astype(int) - 127) == arrays["w.scales"]).all()
    assert set(model.graph.initializers) == {"w.codes", "w.scales.exponents"}
    assert model.opset_imports == {"": 24, "trt": 1}
