"""NVFP4 inputs of products: the numbers of the standard operators, and TensorRT's operator in their place."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from glm4_exporters.formats.nvfp4 import BLOCK, doubled
from glm4_exporters.passes.builder import Builder
from glm4_exporters.passes.fp4_inputs import DOMAIN, OPERATOR, Fp4Inputs, add_rounding

WIDTH = 64
SCOPE = "model.layers.0.mlp.down_proj"
TOTAL = 0.01


def rounding(dtype=ir.DataType.FLOAT16):
    """A graph that rounds x [batch, sequence, WIDTH]."""
    shape = ir.Shape(["batch", "sequence", WIDTH])
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=shape)
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 24})
    b = Builder(graph, f"{SCOPE}/input")
    y = add_rounding(b, x, TOTAL, f"{SCOPE}.weight", dtype)
    y.name, y.type, y.shape = "y", ir.TensorType(dtype), shape
    graph.extend(b.nodes)
    graph.outputs.append(y)
    return ir.Model(graph, ir_version=11)


def computed(x):
    session = ort.InferenceSession(
        ir.to_proto(rounding()).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def wanted(x):
    """The same in torch: a scale of float8 per block, and the nearest 4-bit floats."""
    blocks = torch.from_numpy(x).float().view(*x.shape[:2], -1, BLOCK)
    scales = (
        (blocks.abs().amax(-1, keepdim=True) * np.float32(1 / 6) / TOTAL)
        .clamp(max=448)
        .to(torch.float8_e4m3fn)
    )
    half = scales.float() * np.float32(TOTAL) / 2 + 1e-20
    return (doubled(blocks / half) * half).view(x.shape).to(torch.float16).numpy()


@pytest.mark.parametrize("size", [0.05, 1.0, 5.0])
def test_numbers_become_4_bit_floats_in_blocks(size):
    x = (np.random.default_rng(0).standard_normal((2, 5, WIDTH)) * size).astype(np.float16)
    x[0, 0, :BLOCK] = 0
    found = computed(x)
    same = found == wanted(x)
    assert same.mean() > 0.995  # a number half way between two may round to either
    assert (found[0, 0, :BLOCK] == 0).all()
    error = np.linalg.norm((found - x).astype(np.float32)) / np.linalg.norm(x.astype(np.float32))
    assert 0.05 < error < 0.15
    blocks = np.abs(found.reshape(-1, BLOCK).astype(np.float32))
    assert max(len(np.unique(np.round(block / block.max(), 3))) for block in blocks if block.any()) <= 8


def test_blocks_beyond_the_calibration_saturate():
    x = np.full((1, 1, WIDTH), 1000.0, np.float16)
    np.testing.assert_allclose(computed(x).astype(np.float32), 6 * 448 * TOTAL, rtol=2e-3)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_the_parser_gets_one_operator(dtype):
    model = rounding(dtype)
    assert Fp4Inputs()(model).modified
    assert not Fp4Inputs()(model).modified
    assert [node.op_type for node in model.graph] == [OPERATOR, "DequantizeLinear", "DequantizeLinear"]
    quantize, scales, rounded = model.graph
    assert quantize.inputs[0] is model.graph.inputs[0]
    assert model.graph.outputs[0] is rounded.outputs[0]
    assert model.graph.outputs[0].name == "y"
    assert rounded.inputs[:2] == (quantize.outputs[0], scales.outputs[0])
    total = quantize.inputs[1]
    assert (total.dtype, total is scales.inputs[1]) == (dtype, True)
    assert float(total.const_value.numpy()) == float(np.asarray(TOTAL, dtype.numpy()))
    assert quantize.attributes["scale_type"].value == ir.DataType.FLOAT8E4M3FN
    assert (rounded.attributes["axis"].value, rounded.attributes["block_size"].value) == (-1, BLOCK)
    assert model.graph.opset_imports[DOMAIN] == 1


def test_graphs_without_such_inputs_stay():
    scale = ir.node("QuantizeLinear", [ir.Value(name="x"), ir.Value(name="s")], name="a/QuantizeLinear")
    model = ir.Model(ir.Graph([], [], nodes=[scale], opset_imports={"": 24}), ir_version=11)
    assert not Fp4Inputs()(model).modified
