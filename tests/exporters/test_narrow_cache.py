"""Narrower caches of our attention operator: types, widths and factors in the graph, and factors from the weights."""

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import tiny_config, write_checkpoint
from graphs import lower, traced

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.passes.narrow_cache import NarrowCache
from glm4_exporters.quantize.key_factors import SMALLEST_SHARE, key_factors

ONES = np.ones((2, 16), np.float32)


def caches_of(model):
    return [v for v in (*model.graph.inputs, *model.graph.outputs) if "key_values" in v.name]


@pytest.mark.parametrize(
    ("kv_cache", "element", "width"),
    [
        ("float16", ir.DataType.FLOAT16, 16),
        ("bfloat16", ir.DataType.BFLOAT16, 16),
        ("int8-rows", ir.DataType.INT8, 20),
    ],
)
def test_every_layer_takes_and_gives_the_narrow_type(kv_cache, element, width):
    model = lower(traced(), "cpu")
    factors = [ONES * (i + 1) for i in range(2)] if kv_cache == "int8-rows" else []
    assert NarrowCache(kv_cache, factors)(model).modified
    assert [(v.dtype, v.shape[3]) for v in caches_of(model)] == [(element, width)] * 8
    nodes = [node for node in model.graph if node.op_type == "PartialRopeGqaAttention"]
    assert len(nodes) == 2
    for i, node in enumerate(nodes):
        assert len(node.inputs) == 9 + bool(factors)
        if factors:
            assert node.inputs[9].name == f"model.layers.{i}.self_attn.key_factors"
            np.testing.assert_array_equal(node.inputs[9].const_value.numpy(), factors[i])


def test_factors_of_another_depth_do_not_pass():
    with pytest.raises(ValueError, match="shorter"):
        NarrowCache("int8-rows", [ONES])(lower(traced(), "cpu"))


def test_factors_are_the_sizes_of_the_keys_channels(tmp_path):
    """Against keys of many random inputs of the layer's product."""
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config())
    with Checkpoint.load(folder) as source:
        config = source.config
        names = ("self_attn.k_proj.weight", "self_attn.k_proj.bias", "input_layernorm.weight")
        weight, bias, norm = (source.read(f"model.layers.1.{name}").float().numpy() for name in names)
        found = key_factors(source)
    assert [factors.shape for factors in found] == [(2, 16)] * config.num_hidden_layers
    x = np.random.default_rng(0).standard_normal((20_000, config.hidden_size)).astype(np.float32)
    keys = ((x * norm) @ weight.T + bias).reshape(-1, 2, 16)
    size = (keys**2).mean(0)
    rotary = config.rotary_dim
    size[:, :rotary] = size[:, :rotary].reshape(2, -1, 2).mean(-1).repeat(2, -1)
    wanted = np.sqrt(size) / np.sqrt(size).max(-1, keepdims=True)
    np.testing.assert_allclose(found[1], wanted, rtol=0.05)
    assert found[1].max(-1).tolist() == [1, 1]


def test_a_head_of_zeros_has_finite_factors(tmp_path):
    class Nothing:
        """A checkpoint whose keys are all zero."""

        def __init__(self, source):
            self.config, self._source = source.config, source

        def read(self, name):
            return self._source.read(name) * (0 if "k_proj" in name else 1)

    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config())
    with Checkpoint.load(folder) as source:
        for factors in key_factors(Nothing(source)):
            np.testing.assert_array_equal(factors, np.float32(SMALLEST_SHARE))
