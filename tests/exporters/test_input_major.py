"""int8 weights transposed in their file: the same numbers, each weight in its place."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from glm4_exporters.passes.input_major import BLOCK_ROWS, InputMajor

WIDTH, ROWS = BLOCK_ROWS + 3, {"alone": 7, "left": 5, "right": 6}
READS = {"alone": "x", "left": "z", "right": "z"}  # two products of z


def model(folder, block=0, element=np.int8):
    """Three products by weights [out, in] that lie in a data file."""
    rng = np.random.default_rng(0)
    inputs = {name: value(name, np.zeros((2, WIDTH), np.float32)) for name in ("x", "z")}
    nodes, constants, outputs = [], [], []
    for name, rows in ROWS.items():
        w = constant(f"{name}.w", rng.integers(-7, 8, (rows, WIDTH)).astype(element))
        s = constant(f"{name}.s", rng.random((rows, 1) if block else rows).astype(np.float32) + 0.5)
        attributes = {"axis": 1, "block_size": block} if block else {"axis": 0}
        wide = ir.node("DequantizeLinear", [w, s], attributes, name=f"{name}/DequantizeLinear")
        turned = ir.node("Transpose", wide.outputs, {"perm": [1, 0]}, name=f"{name}/Transpose")
        y = value(f"{name}.y", np.zeros((2, rows), np.float32))
        read = inputs[READS[name]]
        nodes += [wide, turned, ir.node("MatMul", [read, turned.outputs[0]], name=name, outputs=[y])]
        constants += [w, s]
        outputs.append(y)
    graph = ir.Graph(
        list(inputs.values()), outputs, nodes=nodes, initializers=constants, opset_imports={"": 24}, name="g"
    )
    ir.save(ir.Model(graph, ir_version=10), folder / "g.onnx", external_data="data", size_threshold_bytes=64)
    return ir.load(folder / "g.onnx")


def value(name, like):
    return ir.Value(
        name=name, type=ir.TensorType(ir.DataType.from_numpy(like.dtype)), shape=ir.Shape(like.shape)
    )


def constant(name, array):
    made = value(name, array)
    made.const_value = ir.tensor(array, name=name)
    return made


def run(path):
    rng = np.random.default_rng(1)
    given = {name: rng.standard_normal((2, WIDTH)).astype(np.float32) for name in ("x", "z")}
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, given)


def bytes_of(folder, tensor):
    return (folder / "data").read_bytes()[tensor.offset : tensor.offset + tensor.length]


def test_a_lone_products_weight_is_transposed_where_it_lies(tmp_path):
    graph = model(tmp_path)
    wanted, size = run(tmp_path / "g.onnx"), (tmp_path / "data").stat().st_size
    before = {name: bytes_of(tmp_path, graph.graph.initializers[f"{name}.w"].const_value) for name in ROWS}
    assert InputMajor(tmp_path)(graph).modified
    ir.save(graph, tmp_path / "turned.onnx")
    for actual, expected in zip(run(tmp_path / "turned.onnx"), wanted, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)
    assert (tmp_path / "data").stat().st_size == size
    after = {name: graph.graph.initializers[f"{name}.w"].const_value for name in ROWS}
    assert list(after["alone"].shape) == [WIDTH, ROWS["alone"]]
    turned = np.frombuffer(before["alone"], np.int8).reshape(ROWS["alone"], WIDTH).T.tobytes()
    assert bytes_of(tmp_path, after["alone"]) == turned
    for name in ("left", "right"):  # the builder would join them for one profile
        assert bytes_of(tmp_path, after[name]) == before[name]
    assert [node.name for node in graph.graph if node.op_type == "Transpose"] == [
        "left/Transpose",
        "right/Transpose",
    ]
    assert not InputMajor(tmp_path)(graph).modified


@pytest.mark.parametrize(
    "form", [dict(block=WIDTH), dict(element=np.uint8)], ids=["in blocks", "of another type"]
)
def test_other_weights_stay_as_they_are(tmp_path, form):
    graph = model(tmp_path, **form)
    data = (tmp_path / "data").read_bytes()
    assert not InputMajor(tmp_path)(graph).modified
    assert (tmp_path / "data").read_bytes() == data


def test_a_weight_of_two_readers_stays_as_it_is(tmp_path):
    graph = model(tmp_path)
    wide = next(node for node in graph.graph if node.name == "alone/DequantizeLinear")
    graph.graph.append(ir.node("Neg", wide.outputs, name="reader"))
    assert not InputMajor(tmp_path)(graph).modified
