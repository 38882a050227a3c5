"""TensorRT-RTX engines that keep the numbers of a quantized checkpoint."""

import dataclasses
from pathlib import Path

import pytest

from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.sources.fitting import keep_form
from glm4_runtime.errors import ExportError

DATA = Path(__file__).parents[1] / "data" / "quantized"
OPTIONS = ExportOptions(target="tensorrt-rtx", max_seq_len=64, max_batch_size=1)


@pytest.mark.more
@pytest.mark.parametrize(
    ("folder", "activations", "stored"),
    [
        ("awq-4", "float16", "int8 in blocks of 64, zero points subtracted"),
        ("gptq-4", "float16", "int4 in blocks of 128"),
        ("compressed-tensors-w4a16", "bfloat16", "int4 in blocks of 128"),
        ("compressed-tensors-w8a8", "bfloat16", "int8, a scale per row"),
    ],
)
def test_an_engine_is_built_and_its_graph_is_right(tmp_path, folder, activations, stored):
    pytest.importorskip("tensorrt_rtx")
    result = export(DATA / folder, tmp_path / "b", OPTIONS)
    assert result.engine is not None
    assert (result.manifest.activations, result.manifest.tensor_precisions["layers"]) == (activations, stored)
    assert result.parity.mean_kl < 1e-3
    said = result.source["stored"]
    if "subtracted" in stored:
        assert said.endswith("12 matrices take 1.91 times their bytes")
    else:
        assert said == "kept bit for bit"


def test_the_type_of_activations_is_the_scales():
    with Checkpoint.load(DATA / "awq-4") as checkpoint:
        assert keep_form(checkpoint, "tensorrt-rtx", None).activations == "float16"
        assert keep_form(checkpoint, "tensorrt", "fp16").activations == "float16"
        with pytest.raises(ExportError, match="with fp16 activations, not bf16; leave --activations out"):
            keep_form(checkpoint, "tensorrt-rtx", "bf16")
        with pytest.raises(ExportError, match="with fp32 activations, not fp16"):
            keep_form(checkpoint, "cpu", "fp16")


def test_numbers_that_fp16_would_have_to_scale_are_refused(tmp_path, monkeypatch):
    """A remedy against overflow multiplies weights by powers of two, which would change what is kept."""
    from glm4_exporters.quantize import overflow
    from glm4_exporters.quantize.smooth import Smoothing

    pytest.importorskip("tensorrt_rtx")
    name = "model.layers.0.mlp.down_proj.weight"
    remedy = dataclasses.replace(overflow.Remedy(), weights=Smoothing({name: 0.5}))
    monkeypatch.setattr(overflow, "remedies", lambda *_: remedy)
    with pytest.raises(ExportError, match=f"overflows fp16, and its remedy would scale {name}"):
        export(DATA / "awq-4", tmp_path / "b", OPTIONS)
