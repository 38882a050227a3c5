"""The pass to TensorRT's plugin: every layer complete, and one buffer of counters through all of them."""

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import tiny_config

from glm4_exporters.config import Glm4Config
from glm4_exporters.passes.plugin_attention import PluginAttention
from glm4_exporters.trace import trace
from glm4_plugins.launch import PLUGIN_ATTRIBUTES, PLUGIN_INPUTS, PLUGIN_OUTPUTS, choices, counters_shape
from glm4_plugins.operator import OP_TYPE
from glm4_runtime.errors import ExportError

LAYERS, KV_HEADS, BATCH = 2, 2, 4


def traced(dtype="float16", task="causal-lm", **overrides):
    config = tiny_config(
        **(dict(head_dim=64, num_hidden_layers=LAYERS, num_key_value_heads=KV_HEADS) | overrides)
    )
    return trace(Glm4Config.from_dict(config), task, dtype)


def plugins(model):
    return [node for node in model.graph if node.op_type == OP_TYPE]


@pytest.fixture(scope="module")
def before_and_after():
    model = traced()
    before = [
        (node.name, [v.name for v in node.inputs], node.attributes["scale"].as_float())
        for node in plugins(model)
    ]
    result = PluginAttention(BATCH, 90)(model)
    assert result.modified
    return before, model


def test_nodes_are_what_the_plugin_takes(before_and_after):
    before, model = before_and_after
    after = plugins(model)
    assert len(after) == len(before) == LAYERS
    for (name, inputs, scale), new in zip(before, after, strict=True):
        assert new.name == name
        assert len(new.inputs) == len(PLUGIN_INPUTS)
        assert len(new.outputs) == len(PLUGIN_OUTPUTS)
        assert [v.name for v in new.inputs[:9]] == inputs
        values = {name: attribute.value for name, attribute in new.attributes.items()}
        parser = dict(plugin_namespace="glm4", plugin_version="1", aot=1)
        assert {name: values.pop(name) for name in parser} == parser
        assert {name: type(value) for name, value in values.items()} == PLUGIN_ATTRIBUTES
        assert np.float32(values["scale"]) == np.float32(scale)
        assert (values["head_dim"], values["max_batch"], values["compute_capability"]) == (64, BATCH, 90)


def test_counters_go_through_every_layer(before_and_after):
    _, model = before_and_after
    first, second = plugins(model)
    assert model.graph.inputs[-1] is first.inputs[9]
    assert model.graph.inputs[-1].name == "counters"
    assert list(model.graph.inputs[-1].shape) == list(counters_shape(choices(90)[0]))
    assert second.inputs[9] is first.outputs[3]
    assert model.graph.outputs[-1] is second.outputs[3]
    assert model.graph.outputs[-1].name == "present_counters"
    assert len(first.outputs[4].shape) == 1


def test_the_gpus_processors_and_small_blocks_reach_the_nodes():
    model = traced()
    PluginAttention(BATCH, 90, processors=114, small_tiles=True)(model)
    for node in plugins(model):
        values = {name: node.attributes[name].value for name in ("processors", "tiles")}
        assert values == {"processors": 114, "tiles": -1}
    assert list(model.graph.inputs[-1].shape) == [4 * 114]


def test_caches_stay_the_graphs_inputs_and_outputs(before_and_after):
    _, model = before_and_after
    outputs = {value.name: value for value in model.graph.outputs}
    for i, node in enumerate(plugins(model)):
        for index, kind in ((1, "key"), (2, "value")):
            assert node.inputs[index + 2].name == f"past_key_values.{i}.{kind}"
            assert outputs[f"present_key_values.{i}.{kind}"] is node.outputs[index]


def test_the_graph_is_still_well_formed(before_and_after):
    _, model = before_and_after
    proto = ir.to_proto(model)
    names = [name for node in proto.graph.node for name in node.output if name]
    assert len(names) == len(set(names))
    assert {opset.domain for opset in proto.opset_import} >= {"", "glm4"}
    known = {value.name for value in proto.graph.input} | set(model.graph.initializers)
    for node in proto.graph.node:
        assert set(node.input) - {""} <= known
        known |= set(node.output)
    assert {value.name for value in proto.graph.output} <= known


def test_a_second_run_changes_nothing():
    model = traced()
    PluginAttention(BATCH, 90)(model)
    assert not PluginAttention(BATCH, 90)(model).modified


def test_nodes_without_a_past_are_left():
    model = traced(task="encoder")
    assert not PluginAttention(BATCH, 90)(model).modified


@pytest.mark.parametrize(
    ("dtype", "overrides", "message"),
    [("float32", {}, "fp16 and bf16.*--attention native"), ("float16", dict(head_dim=16), "64 and 128")],
)
def test_what_the_kernel_does_not_take_is_refused(dtype, overrides, message):
    with pytest.raises(ExportError, match=message):
        PluginAttention(BATCH, 90)(traced(dtype, **overrides))
