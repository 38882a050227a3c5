"""Products in fp8: the form of the graph, what it computes, and that TensorRT-RTX builds it."""

import functools
from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from checkpoints import random_tensors, tiny_config
from graphs import lower

from glm4_exporters.config import Glm4Config
from glm4_exporters.formats import CODES, FORMATS
from glm4_exporters.passes.fix_capacity import FixCapacity
from glm4_exporters.passes.quantize_inputs import QuantizeInputs
from glm4_exporters.passes.quantize_weights import QuantizeWeights
from glm4_exporters.passes.split_products import SplitProducts
from glm4_exporters.passes.stored import source_of
from glm4_exporters.reference import rotary_tables
from glm4_exporters.trace import ROTARY_COS, ROTARY_SIN, trace
from glm4_runtime import ExportError

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")  # fmt: skip


FORMAT = FORMATS["fp8"]
CONFIG = Glm4Config.from_dict(tiny_config())


@pytest.fixture(scope="module")
def config():
    return CONFIG


@functools.cache
def traced(activations):
    return lower(trace(CONFIG, "causal-lm", activations), "native")


def quantized(config, activations, scales):
    """The tiny model's native graph with fp8 products, its weights in it."""
    model = traced(activations).clone()
    QuantizeWeights("standard", dict.fromkeys(scales, FORMAT))(model)
    QuantizeInputs(scales, unsigned=False)(model)
    tensors = random_tensors(config, "causal-lm", torch.float32, seed=0)
    cos, sin = rotary_tables(config, torch.arange(config.max_position_embeddings))
    tensors |= {ROTARY_COS: cos, ROTARY_SIN: sin}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        source = source_of(value)
        if source is None:
            array = tensors[name].numpy().astype(value.dtype.numpy())
        else:
            matrix = tensors[source.matrix.name]
            part = FORMAT.encode(matrix, torch.float32, largest=float(matrix.abs().max()))[source.part]
            codes = source.part == CODES
            array = part.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn) if codes else part.numpy()
        value.const_value = ir.tensor(array.astype(value.dtype.numpy()), name=name)
    return model


def all_scales(config, absmax=8.0):
    return {
        f"model.layers.{i}.{m}.weight": FORMAT.inputs.scale(absmax)
        for i in range(config.num_hidden_layers)
        for m in MATRICES
    }


def test_the_form(config):
    model = quantized(config, "float16", all_scales(config))
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    count = Counter(node.op_type for node in model.graph)
    layers = config.num_hidden_layers
    assert count["QuantizeLinear"] == 4 * layers  # q, k and v share one
    assert count["DequantizeLinear"] == (4 + 6) * layers
    weight = model.graph.initializers["model.layers.1.mlp.down_proj.weight.codes"]
    assert (weight.dtype, list(weight.shape)) == (ir.DataType.FLOAT8E4M3FN, [64, 96])
    assert list(model.graph.initializers["model.layers.1.mlp.down_proj.weight.scale"].shape) == []
    assert model.graph.initializers["lm_head.weight"].dtype == ir.DataType.FLOAT16


def test_weights_without_a_scale_stay(config):
    name = "model.layers.0.mlp.down_proj.weight"
    model = quantized(config, "float16", {name: 0.1})
    assert Counter(n.op_type for n in model.graph)["QuantizeLinear"] == 1
    with pytest.raises(ExportError, match=r"no product of the graph reads model\.layers\.9"):
        quantized(config, "float16", {"model.layers.9.mlp.down_proj.weight": 0.1})


def test_it_computes_what_the_model_does_to_fp8s_accuracy(config):
    exact = traced("float32").clone()
    close = quantized(config, "float32", all_scales(config))
    for name, value in exact.graph.initializers.items():
        if value.const_value is None:
            array = random_tensors(config, "causal-lm", torch.float32, 0).get(name)
            if array is None:
                cos, sin = rotary_tables(config, torch.arange(config.max_position_embeddings))
                array = cos if name == ROTARY_COS else sin
            value.const_value = ir.tensor(array.numpy(), name=name)
    ids = np.random.default_rng(0).integers(4, 300, (1, 24))
    empty = np.zeros((1, 2, 24, 16), np.float32)
    inputs = {
        "input_ids": ids,
        "past_lengths": np.zeros(1, np.int32),
        "query_lengths": np.array([24], np.int32),
    }
    inputs |= {"logits_indices": np.arange(24)[None]}
    inputs |= {v.name: empty for v in exact.graph.inputs if v.name.startswith("past_key_values.")}
    results = []
    for model in (exact, close):
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        results.append(session.run(["logits"], inputs)[0])
    relative = np.sqrt(((results[0] - results[1]) ** 2).mean() / (results[0] ** 2).mean())
    assert 1e-3 < relative < 0.15


@pytest.mark.parametrize("activations", ["float16", "bfloat16"])
def test_tensorrt_builds_it(config, activations, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    from glm4_exporters.engine.network import Network, check_layers, float32_operators, fold_weight_transposes

    model = quantized(config, activations, all_scales(config))
    FixCapacity(64)(model)
    SplitProducts()(model)
    ir.save(model, tmp_path / "model.onnx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, logger)
    assert parser.parse_from_file(str(tmp_path / "model.onnx")), parser.get_error(0).desc()
    network, layers = Network(trt, definition), config.num_hidden_layers
    check_layers(network, {"QUANTIZE": 4 * layers, "DEQUANTIZE": 11 * layers, "KV_CACHE_UPDATE": 2 * layers})
    operators = {node.name: node.op_type for node in model.graph}
    assert set(float32_operators(network, operators)) == {"Cast", "RMSNormalization"}
    assert fold_weight_transposes(network) == 7 * layers
    build = builder.create_builder_config()
    build.num_compute_capabilities = 1
    build.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for i in range(definition.num_inputs):
        value = definition.get_input(i)
        shape = [tuple(size if axis == -1 else axis for axis in value.shape) for size in (1, 1, 1)]
        profile.set_shape(value.name, *shape)
    build.add_optimization_profile(profile)
    assert builder.build_serialized_network(definition, build) is not None
