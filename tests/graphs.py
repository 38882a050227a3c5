"""Graphs of passes' tests: traced, lowered, filled with weights and run."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from checkpoints import tiny_config

from glm4_exporters import trace as traces
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.passes import lowering, run
from glm4_exporters.targets import TARGETS
from glm4_exporters.weights import attach, layout, write_weights
from glm4_plugins.block_product import library
from glm4_plugins.operator import AttentionAttributes, partial_rope_gqa_attention


def lower(model, target):
    """Take a canonical graph to the operators of a target, in place."""
    return run(model, lowering(TARGETS[target]))


def traced(task="causal-lm", **overrides):
    return traces.trace(Glm4Config.from_dict(tiny_config(**overrides)), task, "float32")


def filled(model, seed=0):
    """The model with small random weights, as a proto."""
    rng = np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            array = rng.standard_normal([int(a) for a in value.shape]).astype(np.float32) * 0.1
            value.const_value = ir.tensor(array + ("norm" in name), name=name)
    return ir.to_proto(model)


def session(model):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(filled(model).SerializeToString(), options, ["CPUExecutionProvider"])


def counts(model):
    return Counter(node.op_type for node in model.graph)


def attention_graph(heads, kv_heads, head_size, rotary_dim, positions=64):
    """A canonical graph of one attention node and nothing else."""

    def value(name, dtype, shape):
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    real, integer = ir.DataType.FLOAT, ir.DataType.INT32
    cache = ["batch", kv_heads, "capacity", head_size]
    inputs = [
        value("query", real, ["batch", "sequence", heads * head_size]),
        value("key", real, ["batch", "sequence", kv_heads * head_size]),
        value("value", real, ["batch", "sequence", kv_heads * head_size]),
        value("past_key_values.0.key", real, cache),
        value("past_key_values.0.value", real, cache),
        value("rotary.cos", real, [positions, rotary_dim // 2]),
        value("rotary.sin", real, [positions, rotary_dim // 2]),
        value("past_lengths", integer, ["batch"]),
        value("query_lengths", integer, ["batch"]),
    ]
    node = ir.node(
        "PartialRopeGqaAttention", inputs,
        dict(num_heads=heads, kv_num_heads=kv_heads, rotary_embedding_dim=rotary_dim, scale=head_size**-0.5),
        domain="glm4", num_outputs=3, name="model.layers.0.self_attn/PartialRopeGqaAttention",
    )  # fmt: skip
    for output, name in zip(node.outputs, ("attn_output", "present_key", "present_value"), strict=True):
        output.name, output.type = name, ir.TensorType(real)
    input_ids = value("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    graph = ir.Graph(
        [input_ids, *inputs], node.outputs, nodes=[node], opset_imports={"": 24, "glm4": 1}, name="attention"
    )
    return ir.Model(graph, ir_version=10)


def attention_case(
    seed, batch, sequence, heads, kv_heads, head_size, rotary_dim, pasts, lengths, capacity=24
):
    rng = np.random.default_rng(seed)
    angles = np.arange(64)[:, None] * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    case = {
        "query": normal(batch, sequence, heads * head_size),
        "key": normal(batch, sequence, kv_heads * head_size),
        "value": normal(batch, sequence, kv_heads * head_size),
        "past_key": normal(batch, kv_heads, capacity, head_size),
        "past_value": normal(batch, kv_heads, capacity, head_size),
        "cos": cos,
        "sin": sin,
        "past_lengths": np.array(pasts, np.int32),
        "query_lengths": np.array(lengths, np.int32),
    }
    return case, AttentionAttributes(heads, kv_heads, rotary_dim, head_size**-0.5)


def run_attention(pass_class, case, attributes, head_size):
    model = attention_graph(
        attributes.num_heads, attributes.kv_num_heads, head_size, attributes.rotary_embedding_dim
    )
    assert pass_class()(model).modified
    assert not pass_class()(model).modified
    assert not any(node.domain == "glm4" for node in model.graph)
    names = {
        "past_key": "past_key_values.0.key",
        "past_value": "past_key_values.0.value",
        "cos": "rotary.cos",
        "sin": "rotary.sin",
    }
    feed = {names.get(name, name): array for name, array in case.items()}
    feed["input_ids"] = np.zeros(case["query"].shape[:2], np.int64)
    return session(model).run(["attn_output", "present_key", "present_value"], feed)


def check_against_numpy(case, attributes, actual):
    expected = partial_rope_gqa_attention(**case, attributes=attributes)
    for b, valid in enumerate(case["query_lengths"]):
        np.testing.assert_allclose(actual[0][b, :valid], expected[0][b, :valid], atol=5e-6)
        end = case["past_lengths"][b] + valid
        for mine, theirs in zip(actual[1:], expected[1:], strict=True):
            np.testing.assert_allclose(mine[b, :, :end], theirs[b, :, :end], atol=2e-6)


SIZES = [(4, 2, 16, 8), (4, 2, 32, 16), (6, 1, 24, 12), (8, 8, 8, 2), (2, 2, 128, 64), (3, 3, 64, 64)]


def assert_the_old_cache_stays(pass_class):
    """Six wide, two valid, onto nine keys: byte for byte what was there before."""
    sizes = (4, 2, 32, 16)
    case, attributes = attention_case(3, 1, 6, *sizes, [9], [2])
    actual = run_attention(pass_class, case, attributes, sizes[2])
    check_against_numpy(case, attributes, actual)
    for present, past in ((actual[1], "past_key"), (actual[2], "past_value")):
        assert present[:, :, :9].tobytes() == case[past][:, :, :9].tobytes()


def assert_same_function(first, second):
    cache = np.zeros((1, 2, 12, 16), np.float32)
    feed = {
        "input_ids": np.arange(9)[None] + 5,
        "past_lengths": np.zeros(1, np.int32),
        "query_lengths": np.array([9], np.int32),
        "logits_indices": np.arange(9)[None],
        **{f"past_key_values.{i}.{side}": cache for i in (0, 1) for side in ("key", "value")},
    }
    for a, b in zip(first.run(None, feed), second.run(None, feed), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def written(model, source, path):
    """The model in ``path.onnx``, with its data from the checkpoint ``source``; returns its initializers."""
    with Checkpoint.load(source) as checkpoint:
        places = layout(model)
        write_weights(checkpoint, places, path.with_suffix(".data"))
    attach(model, places, f"{path.stem}.data")
    ir.save(model, path.with_suffix(".onnx"))
    return ir.load(path.with_suffix(".onnx")).graph.initializers


def logits(path, positions=6, *, as_written=False):
    """Of a tiny causal LM's prompt.

    Optimized, products may round their inputs; as it is written, MatMulNBits does not take scales from a Cast.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if library() is not None:
        options.register_custom_ops_library(str(library()))
    found = ort.InferenceSession(path.with_suffix(".onnx"), options, providers=["CPUExecutionProvider"])
    ids, one = np.arange(4, 4 + positions)[None], np.ones(1, np.int32)
    feed = {
        "input_ids": ids,
        "past_lengths": 0 * one,
        "query_lengths": positions * one,
        "logits_indices": ids - 4,
    }
    past = [value for value in found.get_inputs() if value.name.startswith("past_key")]
    kind = np.float16 if past[0].type == "tensor(float16)" else np.float32
    empty = np.zeros((1, past[0].shape[1], positions, past[0].shape[3]), kind)
    return found.run(["logits"], feed | {value.name: empty for value in past})[0]
