"""Splits without a sequence type."""

import numpy as np
import onnx_ir as ir
from graphs import session

from glm4_exporters.passes.split_sequences import SplitSequences


def test_split_sequences_leaves_no_sequence_type():
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 7]))
    nodes = [ir.node("Constant", [], {"value": ir.tensor(np.array(v))}) for v in ([3, 4], 0, 1)]
    split = ir.node(
        "SplitToSequence", [source, nodes[0].outputs[0]], {"axis": -1}, name="here/SplitToSequence"
    )
    parts = [ir.node("SequenceAt", [split.outputs[0], n.outputs[0]]) for n in nodes[1:]]
    joined = ir.node("Concat", [parts[1].outputs[0], parts[0].outputs[0]], {"axis": -1})
    joined.outputs[0].name, joined.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([source], joined.outputs, nodes=[*nodes, split, *parts, joined], opset_imports={"": 24})
    model = ir.Model(graph, ir_version=10)
    assert SplitSequences()(model).modified
    assert [n.op_type for n in model.graph] == ["Constant", "Split", "Concat"]
    x = np.arange(14, dtype=np.float32).reshape(2, 7)
    np.testing.assert_array_equal(session(model).run(None, {"x": x})[0], np.hstack([x[:, 3:], x[:, :3]]))
    assert not SplitSequences()(model).modified
