"""Integer weights transposed in their file: the same numbers, each weight in its place."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from glm4_exporters.passes.input_major import BLOCK_ROWS, InputMajor

WIDTH, ROWS = BLOCK_ROWS + 32, {"alone": 6, "left": 4, "right": 8}
READS = {"alone": "x", "left": "z", "right": "z"}  # two products of z


def model(folder, block=0, element=np.int8, rows_of=ROWS):
    """Three products by weights [out, in] that lie in a data file."""
    rng = np.random.default_rng(0)
    inputs = {name: value(name, np.zeros((2, WIDTH), np.float32)) for name in ("x", "z")}
    nodes, constants, outputs = [], [], []
    for name, rows in rows_of.items():
        w = constant(f"{name}.w", rng.integers(-7, 8, (rows, WIDTH)).astype(element))
        s = constant(
            f"{name}.s", rng.random((rows, WIDTH // block) if block else rows).astype(np.float32) + 0.5
        )
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
    ir.save(ir.Model(graph, ir_version=10), folder / "g.onnx", external_data="data", size_threshold_bytes=0)
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
    plain = onnxruntime.SessionOptions()  # as it is written: optimized, int4 products round their inputs
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, plain, providers=["CPUExecutionProvider"]).run(None, given)


FORMS = {"int8": {}, "int4 in blocks": dict(block=32, element=ml_dtypes.int4)}


@pytest.mark.parametrize("form", FORMS)
def test_a_lone_products_weight_is_transposed_where_it_lies(tmp_path, form):
    loaded = model(tmp_path, **FORMS[form])
    tensors = loaded.graph.initializers
    wanted, size = run(tmp_path / "g.onnx"), (tmp_path / "data").stat().st_size
    before = {name: np.array(tensors[name].const_value.numpy()) for name in ("alone.w", "alone.s", "left.w")}
    assert InputMajor(tmp_path)(loaded).modified
    ir.save(loaded, tmp_path / "turned.onnx")
    for actual, expected in zip(run(tmp_path / "turned.onnx"), wanted, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)
    assert (tmp_path / "data").stat().st_size == size
    again = ir.load(tmp_path / "turned.onnx").graph.initializers
    np.testing.assert_array_equal(again["alone.w"].const_value.numpy(), before["alone.w"].T)
    np.testing.assert_array_equal(again["alone.s"].const_value.numpy(), before["alone.s"].T)
    np.testing.assert_array_equal(again["left.w"].const_value.numpy(), before["left.w"])  # it has a neighbour
    turned = [node.name for node in loaded.graph if node.op_type == "Transpose"]
    assert turned == ["left/Transpose", "right/Transpose"]
    assert not InputMajor(tmp_path)(loaded).modified


@pytest.mark.parametrize(
    "form",
    [
        dict(block=32),
        dict(element=np.uint8),
        dict(element=ml_dtypes.int4),
        dict(block=32, element=ml_dtypes.int4, rows_of=ROWS | {"alone": 7}),
    ],
    ids=["int8 in blocks", "uint8", "int4 per row", "int4 of odd rows"],
)
def test_other_weights_stay_as_they_are(tmp_path, form):
    loaded = model(tmp_path, **form)
    data = (tmp_path / "data").read_bytes()
    assert not InputMajor(tmp_path)(loaded).modified
    assert (tmp_path / "data").read_bytes() == data


def test_a_weight_of_two_readers_stays_as_it_is(tmp_path):
    loaded = model(tmp_path)
    wide = next(node for node in loaded.graph if node.name == "alone/DequantizeLinear")
    loaded.graph.append(ir.node("Neg", wide.outputs, name="reader"))
    assert not InputMajor(tmp_path)(loaded).modified
