"""Each pass on its own, and what the dialects compute."""

import itertools
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from checkpoints import tiny_config

from glm4_exporters.config import Glm4Config
from glm4_exporters.passes import DIALECTS, lower
from glm4_exporters.passes.fix_capacity import FixCapacity
from glm4_exporters.passes.group_query_attention import GroupQueryAttention
from glm4_exporters.passes.native_attention import NativeAttention
from glm4_exporters.passes.skip_norm import SkipNorm
from glm4_exporters.passes.split_sequences import SplitSequences
from glm4_exporters.passes.transposed_matmul import TransposedMatMul
from glm4_exporters.trace import trace
from glm4_plugins.operator import DOMAIN, AttentionAttributes, partial_rope_gqa_attention

TASKS = ("causal-lm", "sequence-classification", "token-classification", "encoder")


def traced(task="causal-lm", **overrides):
    return trace(Glm4Config.from_dict(tiny_config(**overrides)), task, "float32")


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


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("pasts", "lengths", "sequence"),
    [
        ([0], [5], 5),
        ([7], [4], 4),
        ([3, 9, 0], [1, 1, 1], 1),
        ([19], [5], 5),
        ([2], [2], 6),
        ([0, 0], [3, 5], 5),
    ],
)
def test_group_query_attention_is_the_operator(sizes, pasts, lengths, sequence):
    case, attributes = attention_case(1, len(pasts), sequence, *sizes, pasts, lengths)
    check_against_numpy(case, attributes, run_attention(GroupQueryAttention, case, attributes, sizes[2]))


@pytest.mark.parametrize("sizes", [*SIZES, (2, 1, 10, 4), (4, 4, 18, 6)])
@pytest.mark.parametrize(
    ("pasts", "lengths", "sequence"),
    [([0], [5], 5), ([3, 9, 0], [1, 1, 1], 1), ([19, 2], [5, 4], 5), ([4, 0, 11], [2, 6, 1], 6)],
)
def test_native_attention_is_the_operator(sizes, pasts, lengths, sequence):
    case, attributes = attention_case(2, len(pasts), sequence, *sizes, pasts, lengths)
    check_against_numpy(case, attributes, run_attention(NativeAttention, case, attributes, sizes[2]))


@pytest.mark.parametrize("lowering", [GroupQueryAttention, NativeAttention])
def test_a_padded_chunk_leaves_the_old_cache_alone(lowering):
    """Six wide, two valid, onto nine keys: byte for byte what was there before."""
    sizes = (4, 2, 32, 16)
    case, attributes = attention_case(3, 1, 6, *sizes, [9], [2])
    actual = run_attention(lowering, case, attributes, sizes[2])
    check_against_numpy(case, attributes, actual)
    for present, past in ((actual[1], "past_key"), (actual[2], "past_value")):
        assert present[:, :, :9].tobytes() == case[past][:, :, :9].tobytes()


def test_group_query_attention_leaves_odd_head_sizes_to_native():
    model = traced(head_dim=12)
    assert not GroupQueryAttention()(model).modified
    lower(model, "ort")
    assert counts(model)["Attention"] == 2
    assert not any(node.domain == "glm4" for node in model.graph)


def test_group_query_attention_rotates_in_the_kernel_where_it_can():
    inside, outside = traced(head_dim=32), traced(head_dim=16)
    GroupQueryAttention()(inside)
    GroupQueryAttention()(outside)
    assert counts(inside)["RotaryEmbedding"] == 0
    assert counts(outside)["RotaryEmbedding"] == 4


def test_transposed_matmul_keeps_the_checkpoints_layout():
    model = traced()
    plain = session(traced_and_lowered_attention())
    assert TransposedMatMul()(model).modified
    assert counts(model)["FusedMatMul"] == 13
    assert not counts(model)["MatMul"] + counts(model)["Transpose"]
    assert not TransposedMatMul()(model).modified
    NativeAttention()(model)
    assert_same_function(plain, session(model))


def test_skip_norm_fuses_every_residual():
    model = traced()
    plain = session(traced_and_lowered_attention())
    assert SkipNorm()(model).modified
    found = counts(model)
    # Two residuals per layer; the first norm of all reads the embedding, the sandwich norms no sum.
    assert found["SkipSimplifiedLayerNormalization"] == 4
    assert found["RMSNormalization"] == 5
    assert found["Add"] == 6  # the biases
    assert not SkipNorm()(model).modified
    NativeAttention()(model)
    assert_same_function(plain, session(model))


def traced_and_lowered_attention():
    model = traced()
    NativeAttention()(model)
    return model


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


def test_fix_capacity():
    model = lower(traced(), "native")
    assert FixCapacity(512)(model).modified
    shapes = [v.shape for v in (*model.graph.inputs, *model.graph.outputs) if "key_values" in v.name]
    assert len(shapes) == 8
    assert all(shape[2] == 512 for shape in shapes)
    assert not FixCapacity(512)(model).modified


@pytest.mark.parametrize(("dialect", "task"), list(itertools.product(DIALECTS, TASKS)))
def test_every_dialect_passes_the_strict_checker(dialect, task):
    model = filled(lower(traced(task), dialect))
    onnx.checker.check_model(model, full_check=True)
    own = {DOMAIN} if dialect == "cpu" else set()
    assert {op.domain for op in model.opset_import} <= {"", "com.microsoft", *own}
    if dialect == "native":
        assert {op.domain: op.version for op in model.opset_import} == {"": 24}
        assert all(not node.domain for node in model.graph.node)


@pytest.mark.parametrize("activations", ["float32", "float16", "bfloat16"])
def test_native_parses_with_tensorrt_rtx(tmp_path, activations):
    """NVIDIA's own parser, which needs no GPU, takes the native dialect once its capacity is fixed."""
    trt = pytest.importorskip("tensorrt_rtx")
    model = lower(trace(Glm4Config.from_dict(tiny_config()), "causal-lm", activations), "native")
    FixCapacity(64)(model)
    types = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            array = np.full([int(a) for a in value.shape], 0.01, types[activations].numpy())
            value.const_value = ir.tensor(array, dtype=types[activations], name=name)
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    kinds = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    assert kinds["KV_CACHE_UPDATE"] == 4
    assert kinds["ATTENTION_INPUT"] + kinds["ATTENTION"] >= 2
    assert kinds["ROTARY_EMBEDDING"] == 4
    assert network.num_inputs == 8
