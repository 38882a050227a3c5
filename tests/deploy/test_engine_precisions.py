"""Quantized TensorRT-RTX engines: parity of the graph, what the builder fused, shapes that are not round."""

import dataclasses
import json
from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint

from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_exporters.engine.options import EngineOptions
from glm4_runtime import ExportError
from glm4_runtime.bundle import read_manifest, verify_files

pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "glm4-tiny"
LAYERS = 4
PRODUCTS = 7 * LAYERS + 1  # gate and up apart
JOINED = 6 * LAYERS + 1  # gate and up in one
TARGET = "tensorrt-rtx"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A few hundred tokens that the demo checkpoint was not trained on."""
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text((ROOT / "demo" / "heldout.txt").read_text("utf-8")[:4000], "utf-8")
    return path


def options(precision, text=None, activations=None, layout="shared"):
    return ExportOptions(
        target=TARGET,
        precision=precision,
        activations=activations,
        max_seq_len=128,
        max_batch_size=2,
        calibration=None if text is None else str(text),
        engine=EngineOptions(layout=layout),
    )


# Q, DQ and products, and what a decode step's products became: an fp8 product is a gemm, integers a fusion of their own.
BUILT = {
    "int8": (0, JOINED, JOINED, {"gemm": 0, "runtime_fusion": JOINED}),
    "int4": (0, JOINED, JOINED, {"gemm": 0, "runtime_fusion": JOINED}),
    "fp8": (4 * LAYERS, PRODUCTS + 4 * LAYERS, PRODUCTS, {"gemm": 7 * LAYERS, "runtime_fusion": 1}),
}
# The weights that the built engine's layers read, in each profile. NVFP4's float8 numbers are its scales.
STORED = {
    "nvfp4": {"FP4E2M1": 7 * LAYERS, "FP8": 7 * LAYERS, "Int8": 1},
    "nvfp4-w4a4": {"FP4E2M1": 5 * LAYERS, "FP8": 5 * LAYERS, "Int8": 1},  # at least: q, k and v may be joined
    "mxfp8": {"FP8": 7 * LAYERS, "Int8": 1},
}


@pytest.mark.parametrize("precision", BUILT)
def test_the_demo_passes_its_gate_and_its_products_are_fused(tmp_path, text, precision):
    given = text if precision == "fp8" else None
    result = export(DEMO, tmp_path / "bundle", options(precision, given))
    manifest, report = (
        read_manifest(tmp_path / "bundle"),
        json.loads((tmp_path / "bundle" / "report.json").read_text()),
    )
    quantize, dequantize, products, kernels = BUILT[precision]
    layers = manifest.engine.layers
    assert (layers["QUANTIZE"], layers["DEQUANTIZE"], layers["MATRIX_MULTIPLY"]) == (
        quantize,
        dequantize,
        products,
    )
    for profile in ("prefill", "decode"):
        built = report["engine"]["kernels"][profile]
        assert {kind: built.get(kind, 0) for kind in kernels} == kernels
    assert set(manifest.engine.float32) == {"Cast", "RMSNormalization"}
    assert result.parity.mean_kl < 0.05
    assert result.parity.arithmetic == "as exported"
    oldest = {"fp8": ("89", "120")}.get(precision, ("80", "86", "89", "120"))
    assert manifest.compute_capabilities == oldest
    assert manifest.engine.later_gpus == (precision != "fp8")
    assert manifest.tensor_precisions["layers"] == {"int8": "int8-channel"}.get(precision, precision)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_onnx_that_is_kept_has_its_weights_as_they_were(tmp_path, precision):
    kept = dataclasses.replace(options(precision), parity=False, engine=EngineOptions(keep_onnx=True))
    export(DEMO, tmp_path / "kept", kept)
    manifest = read_manifest(tmp_path / "kept")
    verify_files(tmp_path / "kept", manifest)
    files = {path.name for path in (tmp_path / "kept").iterdir()}
    assert files == {*manifest.files, "manifest.json", "report.json"}


@pytest.mark.parametrize("precision", STORED)
def test_the_engine_holds_weights_of_the_precision(tmp_path, text, precision):
    """The proof without a GPU: the compiled layers read constants of the type, and every matrix is one of them."""
    given = text if precision == "nvfp4-w4a4" else None
    result = export(DEMO, tmp_path / "bundle", options(precision, given))
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    for found in report["engine"]["weights"].values():
        assert found.keys() == STORED[precision].keys()
        if precision != "nvfp4-w4a4":
            assert found == STORED[precision]
        else:
            assert all(STORED[precision][name] <= count <= 7 * LAYERS for name, count in found.items())
    folder = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert folder == {
        *result.manifest.files,
        "manifest.json",
        "report.json",
    }  # nothing of the parser's is left
    assert result.manifest.tensor_precisions["layers"] == precision
    assert (
        result.manifest.compute_capabilities
        == {
            "nvfp4": ("120",),
            "nvfp4-w4a4": ("120",),
            "mxfp8": ("89", "120"),
        }[precision]
    )


SHAPES = {
    "whole blocks": dict(num_attention_heads=6, num_key_value_heads=3, hidden_size=96, intermediate_size=160),
    "8 kv heads": dict(num_attention_heads=16, num_key_value_heads=8, hidden_size=72, intermediate_size=100),
    "no bias": dict(attention_bias=False, hidden_size=80, intermediate_size=90),
    "tied": dict(attention_bias=False, tie_word_embeddings=True),
    "odd width": dict(intermediate_size=91),
}
# RMS of the difference over the reference's, on random weights, the worst of these a third above what was measured.
LARGEST = {"int8": 0.03, "int4": 0.32, "fp8": 0.125, "nvfp4": 0.3, "nvfp4-w4a4": 0.44, "mxfp8": 0.1}


@pytest.mark.parametrize(
    ("shape", "precision", "activations", "layout"),
    [
        ("whole blocks", "int4", "bf16", "split"),
        ("8 kv heads", "fp8", "fp16", "split"),
        ("no bias", "int8", "fp16", "split"),
        ("tied", "int4", "fp16", "shared"),
        ("tied", "fp8", "bf16", "shared"),
        ("odd width", "int8", "bf16", "shared"),
        ("odd width", "fp8", "fp16", "shared"),
        ("whole blocks", "nvfp4", "fp16", "split"),
        ("tied", "nvfp4", "bf16", "shared"),
        ("whole blocks", "nvfp4-w4a4", "bf16", "split"),
        ("whole blocks", "mxfp8", "bf16", "shared"),
        ("tied", "mxfp8", "fp16", "split"),
    ],
)
def test_shapes_that_are_not_round(tmp_path, monkeypatch, shape, precision, activations, layout):
    """Random weights have no tokens to agree on, so the logits are held and the gate, made for models, is open."""
    monkeypatch.setattr("glm4_deploy.parity.check_parity", lambda *_: None)
    source = write_checkpoint(tmp_path / "source", tiny_config(**SHAPES[shape]))
    text = tmp_path / "text.ids"
    text.write_text("\n".join(" ".join(str(4 + 7 * i * j % 290) for i in range(40)) for j in (1, 2, 3)))
    # Other precisions are refused with a text that changes nothing.
    used = text if precision in ("int4", "fp8", "nvfp4", "nvfp4-w4a4") else None
    result = export(source, tmp_path / "bundle", options(precision, used, activations, layout))
    assert 0 < result.parity.relative_error < LARGEST[precision]
    manifest = result.manifest
    assert manifest.activations == manifest.kv_cache == {"fp16": "float16", "bf16": "bfloat16"}[activations]
    files = {"shared": {"model.engine"}, "split": {"prefill.engine", "decode.engine"}}[layout]
    assert {name for name in manifest.files if name.endswith(".engine")} == files


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("odd width", r"down_proj\.weight has 91 inputs per row, an odd number.*--precision int8"),
        # 72 inputs under 3 scales each: TensorRT would take blocks of 24 where 32 were written, without a word.
        ("8 kv heads", r"q_proj\.weight has 72 inputs per row, .* no multiple of the 32 .*--precision int8"),
        ("no bias", r"q_proj\.weight has 80 inputs per row, .* no multiple of the 32 .*--precision int8"),
    ],
)
def test_widths_that_int4_does_not_divide_are_refused_before_the_work(tmp_path, monkeypatch, shape, message):
    monkeypatch.setattr("glm4_deploy.pipeline._trace", lambda *_: pytest.fail("work began"))
    source = write_checkpoint(tmp_path / "source", tiny_config(**SHAPES[shape]))
    with pytest.raises(ExportError, match=message):
        export(source, tmp_path / "bundle", options("int4"))


@pytest.mark.parametrize(("precision", "sm"), [("nvfp4", "89"), ("nvfp4-w4a4", "89"), ("mxfp8", "86")])
def test_gpus_without_such_floats_are_refused(tmp_path, text, precision, sm):
    given = None if precision == "mxfp8" else text
    asked = dataclasses.replace(options(precision, given), engine=EngineOptions(sm=(sm,)))
    with pytest.raises(ExportError, match=f"{precision} needs compute capability .* not {sm}"):
        export(DEMO, tmp_path / "bundle", asked)


def test_the_key_follows_the_calibration_text(tmp_path):
    texts = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for path, content in zip(texts, ("one", "one", "another"), strict=True):
        path.write_text(content)
    first, same, other = (cache_key(DEMO, options("fp8", path)) for path in texts)
    assert first == same != other
