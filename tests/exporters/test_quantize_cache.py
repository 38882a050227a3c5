"""A quantized cache: its scales, the graph that has it, and what is refused."""

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from attention_cases import random_case
from checkpoints import tiny_config, write_checkpoint
from graphs import lower

from glm4_exporters.cache_types import cache_providers, choose_cache
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.eager_attention import KVCache
from glm4_exporters.passes.group_query_attention import GroupQueryAttention
from glm4_exporters.passes.quantize_cache import QuantizeCache
from glm4_exporters.quantize.calibrate import calibrate
from glm4_exporters.quantize.kv_cache import INT8_MAX, MARGIN, SMALLEST_SHARE, CacheScales, cache_scales
from glm4_exporters.quantize.smooth import Smoothing
from glm4_exporters.targets import TARGETS
from glm4_exporters.task_models import load_model
from glm4_exporters.trace import trace
from glm4_plugins.operator import partial_rope_gqa_attention
from glm4_runtime.errors import ExportError

# Scales ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A checkpoint, and its statistics on four sequences of eight tokens."""
    checkpoint = Checkpoint.load(write_checkpoint(tmp_path_factory.mktemp("kv") / "tiny", tiny_config()))
    ids = np.random.default_rng(0).integers(0, 320, (4, 8)).tolist()
    return checkpoint, calibrate(checkpoint, ids), ids


def test_the_radius_bounds_keys_at_positions_that_calibration_never_saw(calibrated):
    checkpoint, calibration, ids = calibrated
    model, beyond_channel = load_model(checkpoint), 0
    for start in range(0, 240, 30):
        cache = KVCache()
        # The first layer's keys depend on the token and its position only.
        positions = torch.arange(start, start + 8)[None].expand(4, -1)
        with torch.inference_mode():
            model(torch.tensor(ids), position_ids=positions, past_key_values=cache)
        keys = cache.layers[0][0].abs().amax((0, 2)).numpy()
        beyond_channel += int((keys > calibration.layers[0].key_absmax * 1.01).sum())
        assert (keys <= calibration.layers[0].key_radius * 1.0001).all()
    assert beyond_channel > 20  # what a scale per channel of its own would have saturated


def test_scales_are_the_largest_values_with_a_margin(calibrated):
    checkpoint, calibration, _ = calibrated
    config = checkpoint.config
    scales = cache_scales(calibration, Smoothing())
    assert len(scales) == config.num_hidden_layers
    for layer, found in zip(calibration.layers, scales, strict=True):
        np.testing.assert_allclose(found.value, layer.value_absmax * MARGIN / INT8_MAX, rtol=1e-6)
        np.testing.assert_allclose(found.key, layer.key_radius * MARGIN / INT8_MAX, rtol=1e-6)
        rotated, kept = np.split(found.key, [config.rotary_dim], axis=-1)
        np.testing.assert_array_equal(rotated[:, ::2], rotated[:, 1::2])
        np.testing.assert_allclose(
            kept, layer.key_absmax[:, config.rotary_dim :] * MARGIN / INT8_MAX, rtol=1e-6
        )


def test_scales_follow_smoothed_values(calibrated):
    _, calibration, _ = calibrated
    rows = np.linspace(0.5, 3, 32, dtype=np.float32)
    smoothing = Smoothing(rows={"model.layers.1.self_attn.v_proj.weight": rows})
    plain, smoothed = (cache_scales(calibration, s) for s in (Smoothing(), smoothing))
    np.testing.assert_array_equal(plain[0].value, smoothed[0].value)
    np.testing.assert_allclose(smoothed[1].value, plain[1].value * rows.reshape(2, 16), rtol=1e-6)
    np.testing.assert_array_equal(plain[1].key, smoothed[1].key)


def test_channels_at_rest_have_scales_above_zero(calibrated):
    _, calibration, _ = calibrated
    layer = calibration.layers[0]
    values = layer.value_absmax.copy()
    values[0, 3], values[1] = 0, 0
    resting = dataclasses.replace(
        calibration, layers=(dataclasses.replace(layer, value_absmax=values), *calibration.layers[1:])
    )
    found = cache_scales(resting, Smoothing())[0].value
    assert found[0, 3] == pytest.approx(SMALLEST_SHARE * values[0].max() * MARGIN / INT8_MAX)
    assert (found > 0).all()
    assert np.isfinite(np.float32(1) / found).all()


# The graph ---------------------------------------------------------------------------------------


def int8_attention(case, attributes, scales):
    """A session of one attention node whose cache is int8."""
    real = ir.DataType.FLOAT
    types = {"int32": ir.DataType.INT32, "float32": real}
    values = {
        name: ir.Value(
            name=name, type=ir.TensorType(types[str(array.dtype)]), shape=ir.Shape([None] * array.ndim)
        )
        for name, array in case.items()
    }
    values["query"].shape = ir.Shape([None, None, case["query"].shape[2]])
    node = ir.node(
        "PartialRopeGqaAttention", list(values.values()), dataclasses.asdict(attributes),
        domain="glm4", num_outputs=3, name="model.layers.0.self_attn/PartialRopeGqaAttention",
    )  # fmt: skip
    for output, name in zip(node.outputs, ("output", "present_key", "present_value"), strict=True):
        output.name, output.type = name, ir.TensorType(real)
    input_ids = ir.Value(
        name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([None, None])
    )
    graph = ir.Graph(
        [input_ids, *values.values()],
        node.outputs,
        nodes=[node],
        opset_imports={"": 24, "glm4": 1},
        name="attention",
    )
    model = ir.Model(graph, ir_version=10)
    assert GroupQueryAttention()(model).modified
    assert QuantizeCache([scales])(model).modified
    serialized = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(serialized, providers=["CPUExecutionProvider"])


def stored(x, scale):
    return np.clip(np.rint(x / scale[:, None]), -128, 127).astype(np.int8)


def attended(case, attributes, scales, keys, values):
    """The operator's meaning, but attending over what an int8 cache holds of every key and value."""
    no_rotation = {"cos": np.ones_like(case["cos"]), "sin": np.zeros_like(case["sin"])}
    size = case["past_key"].shape[-1]
    batch, sequence, _ = case["query"].shape
    output = np.empty_like(case["query"])
    for b in range(batch):
        past = int(case["past_lengths"][b])
        new = slice(past, past + sequence)
        k, v = keys[b] * scales.key[:, None], values[b] * scales.value[:, None]
        # Rotated here, so that the operator has nothing left to rotate and is given K as it is stored.
        one = {name: array[b : b + 1] for name, array in case.items() if name not in no_rotation}
        q = one["query"].reshape(sequence, -1, size)
        c, s = (case[name][new, None].astype(np.float64) for name in ("cos", "sin"))
        turned = q.astype(np.float64)
        half = turned[..., : attributes.rotary_embedding_dim]
        even, odd = half[..., ::2].copy(), half[..., 1::2].copy()
        half[..., ::2], half[..., 1::2] = even * c - odd * s, odd * c + even * s
        one |= no_rotation | {
            "query": turned.reshape(1, sequence, -1),
            "key": k[:, new].swapaxes(0, 1).reshape(1, sequence, -1).astype(np.float64),
            "value": v[:, new].swapaxes(0, 1).reshape(1, sequence, -1).astype(np.float64),
            "past_key": k[None].astype(np.float64),
            "past_value": v[None].astype(np.float64),
        }
        output[b] = partial_rope_gqa_attention(**one, attributes=attributes)[0][0]
    return output


@pytest.mark.parametrize("sizes", [(2, 2, 16, 8), (1, 4, 128, 64), (2, 3, 24, 16), (4, 1, 40, 32)])
@pytest.mark.parametrize(("pasts", "sequence"), [([0], 7), ([9], 5), ([11], 1), ([3, 0, 8], 1)], ids=str)
def test_the_graph_computes_what_int8_holds(sizes, pasts, sequence):
    """Prefill, a chunk after a past, and decode of several sequences; heads of 24 and 40 rotate outside."""
    kv_heads, group, head_size, rotary_dim = sizes
    case, attributes = random_case(
        3, len(pasts), sequence, kv_heads, group, head_size, rotary_dim, pasts, [sequence] * len(pasts)
    )
    rng = np.random.default_rng(1)
    # Some steps are too small for a normal number: those values saturate.
    scales = CacheScales(*rng.uniform(0.01, 0.04, (2, kv_heads, head_size)).astype(np.float32))
    for name, scale in (("past_key", scales.key), ("past_value", scales.value)):
        case[name] = stored(case[name], scale) * scale[:, None]
    session = int8_attention(case, attributes, scales)
    given = {i.name for i in session.get_inputs()}
    feed = {name: array for name, array in case.items() if name in given}
    feed |= {
        "past_key": stored(case["past_key"], scales.key),
        "past_value": stored(case["past_value"], scales.value),
        "input_ids": np.zeros((len(pasts), sequence), np.int64),
    }
    output, *caches = session.run(["output", "present_key", "present_value"], feed)
    exact = partial_rope_gqa_attention(**case, attributes=attributes)
    for actual, wide, scale in zip(caches, exact[1:], (scales.key, scales.value), strict=True):
        assert actual.dtype == np.int8
        expected = stored(wide, scale)
        assert {-128, 127} <= set(expected.reshape(-1).tolist())
        for b, past in enumerate(pasts):
            steps = np.abs(actual[b, :, : past + sequence].astype(int) - expected[b, :, : past + sequence])
            assert steps.max() <= 1  # a number half way between two may round to either
            assert steps.mean() < 1e-3
    np.testing.assert_allclose(output, attended(case, attributes, scales, *caches), atol=3e-6)


@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_every_layer_of_a_graph_gets_its_scales(activations):
    config = Glm4Config.from_dict(tiny_config())
    model = lower(trace(config, "causal-lm", activations), "ort")
    weights = {name for name, value in model.graph.initializers.items() if value.const_value is None}
    scales = [CacheScales(*np.full((2, 2, 16), 0.1 * (i + 1), np.float32)) for i in range(2)]
    assert QuantizeCache(scales)(model).modified
    caches = [v for v in (*model.graph.inputs, *model.graph.outputs) if "key_values" in v.name]
    assert [value.dtype for value in caches] == [ir.DataType.INT8] * 8
    for i in range(2):
        for side in ("key", "value"):
            scale = model.graph.initializers[f"model.layers.{i}.self_attn.{side}_scale"].const_value.numpy()
            assert (scale.shape, scale.dtype) == ((1, 2, 1, 16), np.float32)
            assert (scale == np.float32(0.1 * (i + 1))).all()
    # The scales lie in the graph; only weights are left to be streamed.
    left = {name for name, value in model.graph.initializers.items() if value.const_value is None}
    assert left == weights


def test_a_graph_and_scales_of_another_depth_do_not_pass():
    model = lower(trace(Glm4Config.from_dict(tiny_config()), "causal-lm", "float32"), "ort")
    with pytest.raises(ValueError, match="shorter"):
        QuantizeCache([CacheScales(*np.ones((2, 2, 16), np.float32))])(model)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "task", "target", "activations", "reason"),
    [
        ({}, "encoder", "ort", "float32", "task encoder has no cache"),
        ({}, "causal-lm", "native", "float32", "target native has no operator with an int8 cache"),
        ({}, "causal-lm", "tensorrt-rtx", "float16", "target tensorrt-rtx has no operator"),
        ({}, "causal-lm", "tensorrt", "bfloat16", "fp32 and fp16 activations only"),
        ({"head_dim": 12}, "causal-lm", "ort", "float32", "multiples of 8 dims, and this model's have 12"),
        ({}, "causal-lm", "ort", "bfloat16", "fp32 and fp16 activations only"),
    ],
)
def test_int8_is_refused_where_it_cannot_be(overrides, task, target, activations, reason):
    config = Glm4Config.from_dict(tiny_config(**overrides))
    with pytest.raises(ExportError, match=f"cannot be int8: .*{reason}.*leave --kv-cache out"):
        choose_cache(config, task, TARGETS[target], activations, "int8")
    assert choose_cache(config, task, TARGETS[target], activations) == (
        activations if task == "causal-lm" else None
    )


def test_fp8_is_for_one_target():
    config = Glm4Config.from_dict(tiny_config())
    assert choose_cache(config, "causal-lm", TARGETS["tensorrt"], "float16", "fp8") == "float8e4m3fn"
    with pytest.raises(
        ExportError, match="be fp8: target ort has no operator with an fp8 cache; target tensorrt has"
    ):
        choose_cache(config, "causal-lm", TARGETS["ort"], "float32", "fp8")


def test_our_own_attention_has_an_int8_cache_of_any_head():
    config = Glm4Config.from_dict(tiny_config(head_dim=12))
    assert choose_cache(config, "causal-lm", TARGETS["cpu"], "float32", "int8") == "int8-rows"


def test_other_caches_are_unknown():
    with pytest.raises(
        ExportError, match="unknown KV cache 'int4'; it is one of auto, fp32, fp16, bf16, int8, fp8"
    ):
        choose_cache(Glm4Config.from_dict(tiny_config()), "causal-lm", TARGETS["ort"], "float32", "int4")


def test_only_proved_providers_run_an_int8_cache():
    both = ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert cache_providers("float16", TARGETS["ort"], "float16") == both
    assert cache_providers("int8", TARGETS["ort"], "float16") == ("CPUExecutionProvider",)
