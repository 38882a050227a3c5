"""The residual sum between two stages is a node of its own, and the bits stay."""

import numpy as np
import pytest
from graphs import counts, lower, session, traced

from glm4_exporters.passes.open_stages import OpenStages
from glm4_runtime.bundle.graph_io import hidden_name


def logits_of(model):
    inputs = {
        "input_ids": [[5, 6, 7]],
        "past_lengths": [0],
        "query_lengths": [3],
        "logits_indices": [[0, 1, 2]],
    }
    feeds = {name: np.array(value, np.int32 if "lengths" in name else np.int64) for name, value in inputs.items()}  # fmt: skip
    made = session(model)
    for spec in made.get_inputs():
        if spec.name not in feeds:
            feeds[spec.name] = np.zeros((1, spec.shape[1], 8, spec.shape[3]), np.float32)
    return made.run(["logits"], feeds)[0]


def test_a_fused_norm_gives_its_sum_to_a_node_of_its_own():
    model, opened = (lower(traced(), "ort") for _ in range(2))
    assert OpenStages([0, 1])(opened).modified
    node = next(node for node in opened.graph if node.outputs[0].name == hidden_name(0))
    assert node.op_type == "Add"
    before, after = counts(model), counts(opened)
    assert after - before == {"Add": 1, "Sub": 1}
    np.testing.assert_array_equal(logits_of(opened), logits_of(model))


@pytest.mark.parametrize(("target", "layers"), [("native", [0, 1]), ("ort", [0])])
def test_nothing_to_separate(target, layers):
    model = lower(traced(), target)
    assert not OpenStages(layers)(model).modified
    assert any(value.name == hidden_name(0) for node in model.graph for value in node.outputs)
