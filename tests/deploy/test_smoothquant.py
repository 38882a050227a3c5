"""int8-sq: products of integers, found in the graph that ONNX Runtime runs, as good as it promises."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from checkpoints import tiny_config, write_checkpoint
from cpu_operators import CPU_TARGET

from benchmarks.make_hostile_checkpoints import write_outliers
from glm4_deploy.pipeline import ExportOptions, export
from glm4_deploy.texts import read_sequences
from glm4_exporters.quantize.static import StaticSmoothQuant
from glm4_runtime import Session
from glm4_runtime.bundle import read_manifest
from glm4_runtime.errors import ExportError, GateError
from glm4_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "demo"
SHAPES = {
    "biased": {},
    "unbiased, 8 KV heads": {"attention_bias": False, "num_attention_heads": 8, "num_key_value_heads": 8},
    "no multiple of a block": {"hidden_size": 72, "intermediate_size": 100},
    "odd": {"hidden_size": 67, "intermediate_size": 97},
    "tied": {"tie_word_embeddings": True},
}
PRODUCTS = 5  # of a layer: q, k, v, o_proj, gate_up


@pytest.fixture
def ids_file(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "text.ids"
    path.write_text("\n".join(" ".join(map(str, rng.integers(0, 320, 48))) for _ in range(8)))
    return path


@pytest.fixture(scope="module")
def demo_text(tmp_path_factory):
    """A tenth of the demo's calibration text, which is from other chapters than the held-out one."""
    path = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    lines = (DEMO / "calibration.jsonl").read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:6]), "utf-8")
    return str(path)


def operators_run(bundle, tmp_path):
    """How often each operator stands in the graph that ONNX Runtime makes of a bundle's on the CPU."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def perplexity(bundle):
    tokenizer = Tokenizer.from_folder(DEMO / "glm4-tiny")
    total, count = 0.0, 0
    with Session.open(bundle) as session:
        for ids in read_sequences(DEMO / "heldout.txt", tokenizer, 256, 20):
            logits = np.concatenate(list(session.score(ids)))[:-1].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total -= float(logs[np.arange(len(ids) - 1), ids[1:]].sum())
            count += len(ids) - 1
    return np.exp(total / count)


def test_the_demo_loses_less_than_a_hundredth_in_integer_kernels(tmp_path, demo_bundle, demo_text):
    for target in ("ort", "native"):
        options = ExportOptions(target=target, precision="int8-sq", calibration=demo_text, max_batch_size=4)
        result = export(DEMO / "glm4-tiny", tmp_path / target, options)
        assert perplexity(tmp_path / target) < 1.01 * perplexity(demo_bundle)
        kept = {"ort": "int8", "native": "int8-channel"}[target]  # down_proj's
        assert result.manifest.tensor_precisions["layers"] == f"int8-sq, {kept}"
        assert all(choice["error"] < choice["error_before"] for choice in result.calibration["scales"])
    run = operators_run(tmp_path / "ort", tmp_path)
    assert run["MatMulIntegerToFloat"] == 4 * PRODUCTS
    assert run["QuantizeLinear"] == 4 * 3  # q, k and v share one
    assert run["MatMulNBits"] == 4 + 1  # down_proj, and the head
    assert not run["MatMul"] + run["DequantizeLinear"]


def test_outliers_fail_the_gate_unless_they_are_smoothed(tmp_path, demo_text, monkeypatch):
    folder = write_outliers(DEMO / "glm4-tiny", tmp_path / "outliers")
    options = ExportOptions(precision="int8-sq", calibration=demo_text)
    result = export(folder, tmp_path / "smoothed", options)
    worst = max(choice["error_before"] / choice["error"] for choice in result.calibration["scales"])
    assert worst > 100
    monkeypatch.setattr(StaticSmoothQuant, "candidates", lambda *_: ())
    with pytest.raises(GateError, match="does not match the reference in int8-sq: mean KL"):
        export(folder, tmp_path / "plain", options)


@pytest.mark.parametrize("target", ["ort", CPU_TARGET, "native"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_exported_and_right(tmp_path, ids_file, shape, target):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(**SHAPES[shape]))
    options = ExportOptions(target=target, precision="int8-sq", calibration=str(ids_file))
    export(folder, tmp_path / "bundle", options)  # parity is its test
    if target == "ort":
        assert operators_run(tmp_path / "bundle", tmp_path)["MatMulIntegerToFloat"] == 2 * PRODUCTS


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "encoder"])
def test_the_other_tasks_too(tmp_path, ids_file, task):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(), task=task)
    for target in ("ort", "native"):
        options = ExportOptions(target=target, precision="int8-sq", calibration=str(ids_file))
        result = export(folder, tmp_path / target, options)
        assert result.parity is not None
        assert result.parity.relative_error > 1e-3  # something was rounded


@pytest.mark.parametrize("activations", ["fp16", "bf16"])
def test_native_products_take_16_bit_activations(tmp_path, tiny_checkpoint, ids_file, activations):
    given = {"precision": "int8-sq", "calibration": str(ids_file), "activations": activations}
    export(tiny_checkpoint, tmp_path / "bundle", ExportOptions(target="native", **given))
    assert read_manifest(tmp_path / "bundle").activations != "float32"
    with pytest.raises(ExportError, match=r"integer products give fp32.*leave --activations out"):
        export(tiny_checkpoint, tmp_path / "other", ExportOptions(target="ort", **given))


def test_the_native_form_is_what_tensorrt_takes(tmp_path, tiny_checkpoint, ids_file):
    options = ExportOptions(target="native", precision="int8-sq", calibration=str(ids_file), parity=False)
    bundle = export(tiny_checkpoint, tmp_path / "bundle", options).bundle
    graph = onnx.load(bundle / "model.onnx").graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if "zero" in t.name}
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 2 * 3
    for node in quantizers:
        assert arrays[node.input[2]].dtype == np.int8
        assert arrays[node.input[2]] == 0


def test_tensorrt_parses_and_builds_it(tmp_path, tiny_checkpoint, ids_file):
    pytest.importorskip("tensorrt_rtx")
    options = ExportOptions(
        target="tensorrt-rtx", precision="int8-sq", calibration=str(ids_file), parity=False
    )
    result = export(tiny_checkpoint, tmp_path / "bundle", options)
    assert result.engine is not None
    assert result.manifest.compute_capabilities


def test_a_recipe_mixes_products_in_fp8_and_of_integers(tmp_path, tiny_checkpoint, ids_file):
    pytest.importorskip("tensorrt_rtx")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[tensors]\n"*.mlp.gate_up_proj.weight" = "int8-sq"\n')
    given = {"precision": "fp8", "calibration": str(ids_file), "recipe": str(recipe), "parity": False}
    result = export(tiny_checkpoint, tmp_path / "bundle", ExportOptions(target="tensorrt-rtx", **given))
    searched = [choice["tensors"] for choice in result.calibration["scales"]]
    assert searched == [[f"model.layers.{layer}.mlp.gate_up_proj.weight"] for layer in range(2)]


def test_without_text_it_is_refused_before_the_work(tmp_path, tiny_checkpoint):
    with pytest.raises(ExportError, match="int8-sq needs --calibration FILE"):
        export(tiny_checkpoint, tmp_path / "bundle", ExportOptions(precision="int8-sq"))
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_moves_matrices_in_and_out(tmp_path, tiny_checkpoint, ids_file):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[tensors]\n"model.layers.0.self_attn.k_proj.weight" = "int8"\n"*.mlp.down_proj.weight" = "int8-sq"\n'
    )
    options = ExportOptions(precision="int8-sq", calibration=str(ids_file), recipe=str(recipe))
    bundle = export(tiny_checkpoint, tmp_path / "bundle", options).bundle
    run = operators_run(bundle, tmp_path)
    assert run["MatMulIntegerToFloat"] == 2 * PRODUCTS - 1 + 2
    assert run["MatMulNBits"] == 1 + 1
    report = json.loads((bundle / "report.json").read_text())["calibration"]
    assert len(report["scales"]) == 2 * 4
    recipe.write_text('[tensors]\n"lm_head.weight" = "int8-sq"\n')
    with pytest.raises(ExportError, match=r"lm_head\.weight cannot be int8-sq.*take int8"):
        export(tiny_checkpoint, tmp_path / "other", options)


def test_two_exports_are_byte_identical(tmp_path, tiny_checkpoint, ids_file):
    options = ExportOptions(precision="int8-sq", calibration=str(ids_file), parity=False)
    for name in ("one", "two"):
        export(tiny_checkpoint, tmp_path / name, options)
    for file in ("manifest.json", "model.onnx", "model.onnx.data"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
