"""Products apart, over views of one data file: the same numbers, and nothing written again."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from glm4_exporters.passes.split_products import SplitProducts

ROWS, COLUMNS, BLOCK = 12, 32, 16


def graph(folder, quantized):
    """x [2, 32] times a weight [12, 32] transposed, split into 5 and 7; the weight lies in a data file."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, COLUMNS]))
    dtype = {None: np.float32, "int8": np.int8, "int4": ml_dtypes.int4, "two levels": np.int8}[quantized]
    array = rng.integers(-7, 8, (ROWS, COLUMNS)).astype(dtype)
    constants = [ir.Value(name="w", const_value=ir.tensor(array, name="w"))]
    nodes, weight = [], constants[0]
    if quantized:
        scales = rng.random((ROWS, COLUMNS // BLOCK)).astype(np.float32) + 0.5
        constants.append(ir.Value(name="s", const_value=ir.tensor(scales, name="s")))
        read = constants
        if quantized == "two levels":  # the scales are integers under a scale of their own
            constants[1] = ir.Value(name="s", const_value=ir.tensor((scales * 100).astype(np.int8), name="s"))
            constants.append(ir.Value(name="t", const_value=ir.tensor(np.array(0.01, np.float32), name="t")))
            nodes.append(ir.node("DequantizeLinear", constants[1:], name="m/inner"))
            read = [constants[0], nodes[-1].outputs[0]]
        nodes.append(ir.node("DequantizeLinear", read, {"axis": 1, "block_size": BLOCK}, name="m/DQ"))
        weight = nodes[-1].outputs[0]
    nodes.append(ir.node("Transpose", [weight], {"perm": [1, 0]}, name="m/Transpose"))
    nodes.append(ir.node("MatMul", [x, nodes[-1].outputs[0]], name="m/MatMul"))
    sizes = ir.Value(name="sizes", const_value=ir.tensor(np.array([5, 7]), name="sizes"))
    split = ir.node("Split", [nodes[-1].outputs[0], sizes], {"axis": -1}, num_outputs=2, name="Split")
    for output, size in zip(split.outputs, (5, 7), strict=True):
        output.name, output.shape = f"part{size}", ir.Shape([2, size])
    for value in (*constants, sizes):
        value.type, value.shape = (
            ir.TensorType(value.const_value.dtype),
            ir.Shape(value.const_value.shape),
        )
    sums = [
        ir.node("Neg", [output], name=f"Neg{i}", outputs=[ir.Value(name=f"y{i}")])
        for i, output in enumerate(split.outputs)
    ]
    for node, size in zip(sums, (5, 7), strict=True):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, size])
    made = ir.Graph(
        [x],
        [node.outputs[0] for node in sums],
        nodes=[*nodes, split, *sums],
        initializers=[*constants, sizes],
        opset_imports={"": 24},
        name="g",
    )
    model = ir.Model(made, ir_version=10)
    ir.save(model, folder / "whole.onnx", external_data="data", size_threshold_bytes=64)
    return ir.load(folder / "whole.onnx")


def run(path):
    x = np.random.default_rng(1).standard_normal((2, COLUMNS)).astype(np.float32)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})


@pytest.mark.parametrize("quantized", [None, "int8", "int4", "two levels"])
def test_parts_are_views_and_compute_the_same(tmp_path, quantized):
    model = graph(tmp_path, quantized)
    wanted = run(tmp_path / "whole.onnx")
    size = (tmp_path / "data").stat().st_size
    assert SplitProducts()(model).modified
    ir.save(model, tmp_path / "parts.onnx")
    assert (tmp_path / "data").stat().st_size == size
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("MatMul"), kinds.count("Split")) == (2, 0)
    assert {"w", "s"}.isdisjoint(model.graph.initializers)
    first, second = (model.graph.initializers[f"w.{i}"].const_value for i in (0, 1))
    assert (list(first.shape), list(second.shape)) == ([5, COLUMNS], [7, COLUMNS])
    assert first.offset + first.length == second.offset
    for actual, expected in zip(run(tmp_path / "parts.onnx"), wanted, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert not SplitProducts()(model).modified
