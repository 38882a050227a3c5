"""Input scales that a quantized checkpoint brings take the place of calibration text."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.form import choose_form
from glm4_exporters.sources.inputs import brought_scales
from glm4_runtime.errors import CheckpointError, ExportError

DATA = Path(__file__).parents[1] / "data" / "quantized"
STATIC, STATIC_FP8 = DATA / "compressed-tensors-w8a8-static", DATA / "compressed-tensors-fp8"
INT8_SQ = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_up_proj")


def own_scales(folder):
    return {
        name.removesuffix(".input_scale"): float(value)
        for name, value in load_file(folder / "model.safetensors").items()
        if name.endswith(".input_scale")
    }


def scales_of(bundle):
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    return {
        tensor.name.removesuffix(".weight.input_scale"): float(onnx.numpy_helper.to_array(tensor))
        for tensor in graph.initializer
        if tensor.name.endswith(".input_scale")
    }


@pytest.mark.parametrize("target", ["ort", "native"])
def test_int8_sq_without_calibration(tmp_path, target):
    result = export(STATIC, tmp_path / "b", ExportOptions(target=target, precision="int8-sq"))
    found, own = scales_of(tmp_path / "b"), own_scales(STATIC)
    assert found
    assert found == {name: own[name] for name in found}
    assert {name.partition(".layers.")[2][2:] for name in found} <= set(INT8_SQ)
    assert result.source["stored"].endswith("with the checkpoint's scales for inputs")
    assert result.parity.relative_error < 0.2


def edited(tmp_path, change):
    shutil.copytree(STATIC, tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    return tmp_path / "c"


def brought(folder, target="ort", precision="int8-sq"):
    with Checkpoint.load(folder) as checkpoint:
        form = choose_form(checkpoint.config, checkpoint.task, target, precision)
        return brought_scales(checkpoint, form.rounded_inputs)


def test_fp8_without_calibration():
    """For TensorRT; its graph needs a GPU to run, so the scales are compared here."""
    found, own = brought(STATIC_FP8, "tensorrt-rtx", "fp8"), own_scales(STATIC_FP8)
    assert found == {f"{name}.weight": scale for name, scale in own.items()}


@pytest.mark.more
@pytest.mark.parametrize(("folder", "precision"), [(STATIC_FP8, "fp8"), (STATIC, "int8-sq")])
def test_engines_without_calibration(tmp_path, folder, precision):
    pytest.importorskip("tensorrt_rtx")
    asked = ExportOptions(target="tensorrt-rtx", precision=precision, max_seq_len=64, max_batch_size=1)
    result = export(folder, tmp_path / "b", asked)
    assert result.engine is not None
    assert result.source["stored"].endswith("with the checkpoint's scales for inputs")
    assert result.parity.mean_kl < 5e-3


@pytest.mark.parametrize("precision", ["int8-sq", "fp8"])
def test_scales_of_other_types_are_not_used(precision):
    assert brought(STATIC_FP8 if precision == "int8-sq" else STATIC, "tensorrt-rtx", precision) is None
    assert brought(DATA / "original", "tensorrt-rtx", precision) is None


NAME = "model.layers.1.self_attn.o_proj"


def test_a_missing_scale_or_a_zero_point_needs_calibration(tmp_path):
    folder = edited(tmp_path, lambda tensors: tensors.pop(f"{NAME}.input_scale"))
    assert brought(folder) is None
    with pytest.raises(ExportError, match="precision int8-sq needs --calibration FILE"):
        export(folder, tmp_path / "b", ExportOptions(precision="int8-sq"))
    shutil.rmtree(folder)
    shifted = {f"{NAME}.input_zero_point": torch.tensor([3], dtype=torch.int8)}
    assert brought(edited(tmp_path, lambda tensors: tensors.update(shifted))) is None


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(tmp_path, wrong):
    bad = torch.tensor([wrong], dtype=torch.bfloat16)
    folder = edited(tmp_path, lambda tensors: tensors.update({f"{NAME}.input_scale": bad}))
    with pytest.raises(CheckpointError, match=r"o_proj\.input_scale is .* but must be a positive number"):
        brought(folder)


def test_calibration_text_takes_precedence(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "t.ids").write_text("\n".join(" ".join(map(str, rng.integers(4, 96, 48))) for _ in range(4)))
    asked = ExportOptions(precision="int8-sq", calibration=str(tmp_path / "t.ids"), parity=False)
    result = export(STATIC, tmp_path / "b", asked)
    assert scales_of(tmp_path / "b") != own_scales(STATIC)
    assert "scales for inputs" not in result.source["stored"]
    assert json.loads((tmp_path / "b" / "report.json").read_text())["calibration"]["text"] == "t.ids"
