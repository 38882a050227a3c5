"""The order of passes, and what the dialects compute."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from checkpoints import tiny_config
from graphs import filled, lower, traced

from glm4_exporters.config import Glm4Config
from glm4_exporters.form import choose_form
from glm4_exporters.passes import engine_passes, model_passes
from glm4_exporters.passes.fix_capacity import FixCapacity
from glm4_exporters.trace import trace
from glm4_plugins.operator import DOMAIN

TASKS = ("causal-lm", "sequence-classification", "token-classification", "encoder")
ORDER = {
    "ort": "ScaleEps GroupQueryAttention NativeAttention TransposedMatMul SkipNorm QuantizeCache QuantizeWeights",
    "cpu": "ScaleEps TransposedMatMul SkipNorm NarrowCache PackedProducts QuantizeWeights",
    "native": "ScaleEps NativeAttention QuantizeCache QuantizeWeights",
    "tensorrt-rtx": "ScaleEps NativeAttention RoundCache QuantizeWeights InputMajor",
    "tensorrt": "ScaleEps NativeAttention RoundCache QuantizeWeights",
}


def names(passes):
    return " ".join(type(each).__name__ for each in passes)


@pytest.mark.parametrize("target", ORDER)
def test_the_order_of_passes(target):
    form = choose_form(Glm4Config.from_dict(tiny_config()), "causal-lm", target, "int8")
    form = form.with_cache("int8-rows" if target == "cpu" else "int8")
    found = dict(norm_bits={"model.norm": 1}, cache_scales=[object()], input_scales={})
    assert names(model_passes(form, **found)) == ORDER[target]
    assert names(model_passes(form, **found | dict(input_scales={"x": 1.0}))).split()[-2:] in (
        ["QuantizeWeights", "QuantizeInputs"],
        ["QuantizeInputs", "InputMajor"],
    )
    nothing = model_passes(form, norm_bits={}, cache_scales=(), input_scales={})
    assert not {"ScaleEps", "QuantizeCache", "RoundCache", "QuantizeInputs"} & set(names(nothing).split())
    plain = model_passes(form.with_cache("float32"), norm_bits={}, cache_scales=(), input_scales={})
    assert "Cache" not in names(plain)
    assert names(engine_passes(64)) == "FixCapacity SplitProducts Fp4Inputs Fp4Weights Mxfp8Weights"


def test_a_plugin_takes_the_place_of_the_targets_attention():
    form = choose_form(Glm4Config.from_dict(tiny_config()), "causal-lm", "tensorrt", "fp16")
    plugin = object()
    passes = model_passes(form, norm_bits={}, cache_scales=(), input_scales={}, plugin=plugin)
    assert passes == [plugin]


@pytest.mark.parametrize(("dialect", "task"), list(itertools.product(("native", "ort", "cpu"), TASKS)))
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


def test_each_pass_has_its_own_test_file():
    import glm4_exporters.passes as package

    folder = Path(package.__file__).parent
    passes = {path.stem for path in folder.glob("*.py") if "ir.passes." in path.read_text("utf-8")} - {
        "__init__"
    }
    assert len(passes) > 12
    assert not {name for name in passes if not Path(__file__).with_name(f"test_{name}.py").exists()}
