"""The pass that scales a norm's eps, and with scaled weights the whole remedy on a graph."""

import functools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from checkpoints import tiny_config
from graphs import lower

from glm4_exporters.config import Glm4Config
from glm4_exporters.passes.scale_eps import ScaleEps
from glm4_exporters.trace import trace

NORM = "model.layers.1.post_mlp_layernorm"
MATRIX = "model.layers.1.mlp.down_proj.weight"


def epsilons(model):
    return {
        node.name.rpartition("/")[0]: node.attributes["epsilon"].as_float()
        for node in model.graph
        if node.op_type == "RMSNormalization"
    }


@functools.cache
def canonical():
    return trace(Glm4Config.from_dict(tiny_config()), "encoder", "float32")


def traced():
    """A canonical graph of one's own; tracing takes seconds."""
    return canonical().clone()


def run(model, scale):
    """Small random weights, down_proj of layer 1 times ``scale``; its output is of the size of eps."""
    rng = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            array = rng.standard_normal([int(a) for a in value.shape]).astype(np.float32) * 0.1 + (
                "norm" in name
            )
            array *= np.float32(1e-2 * scale) if name == MATRIX else 1
            value.const_value = ir.tensor(array.astype(np.float32), name=name)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, options, ["CPUExecutionProvider"])
    feeds = {"input_ids": np.arange(5, 25)[None], "query_lengths": np.array([20], np.int32)}
    return session.run(None, feeds)[0]


def test_only_the_named_norm_changes():
    model = traced()
    before = epsilons(model)
    assert ScaleEps({NORM: 3})(model).modified
    assert epsilons(model) == before | {NORM: pytest.approx(before[NORM] / 64, rel=1e-7)}


@pytest.mark.parametrize("dialect", ["native", "ort"])
def test_scaled_weights_and_eps_compute_the_same_to_the_bit(dialect):
    plain, scaled, careless = traced(), traced(), traced()
    ScaleEps({NORM: 5})(scaled)
    expected = run(lower(plain, dialect), 1.0)
    np.testing.assert_array_equal(run(lower(scaled, dialect), 2.0**-5), expected)
    assert np.abs(run(lower(careless, dialect), 2.0**-5) - expected).max() > 1e-2


def test_nothing_to_scale():
    model = traced()
    assert not ScaleEps({})(model).modified
    assert not ScaleEps({NORM: 0})(model).modified


def test_a_norm_that_is_not_there():
    with pytest.raises(ValueError, match="no RMSNormalization"):
        ScaleEps({"model.layers.7.norm": 1})(traced())
