"""Numbers and scales of quantized checkpoints go into a bundle bit for bit."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.errors import ExportError

DATA = Path(__file__).parents[1] / "data" / "quantized"
NAME = "model.layers.0.mlp.down_proj.weight"  # 128 rows, 256 inputs


def stored(bundle):
    """The bytes of each part of the matrix in the bundle's file."""
    parts = {}
    for tensor in onnx.load(bundle / "model.onnx", load_external_data=False).graph.initializer:
        if tensor.name.startswith(f"{NAME}."):
            place = {entry.key: entry.value for entry in tensor.external_data}
            with (bundle / place["location"]).open("rb") as file:
                file.seek(int(place["offset"]))
                parts[tensor.name.removeprefix(f"{NAME}.")] = tensor, file.read(int(place["length"]))
    return parts


def rows_of(folder):
    with Checkpoint.load(DATA / folder) as checkpoint:
        matrix = checkpoint.views.by_name[NAME].pieces[0].stored
        return matrix.load(checkpoint.read_stored)(0, matrix.rows)


def fours(data, columns):
    """Unsigned 4-bit numbers, the first of two in the low half of a byte."""
    data = np.frombuffer(data, np.uint8)
    return np.stack([data & 15, data >> 4], -1).reshape(-1, columns)


@pytest.mark.parametrize("folder", ["awq-4", "gptq-4-asym", "compressed-tensors-w4a16-asym"])
@pytest.mark.parametrize("target", ["native", "ort", "cpu"])
def test_numbers_scales_and_zero_points(tmp_path, folder, target):
    result = export(DATA / folder, tmp_path / "b", ExportOptions(target=target))
    assert result.source["stored"] == "kept bit for bit"
    if target == "native":
        assert result.parity.max_abs_error < 1e-5
    else:  # inputs are rounded to 8 bits
        assert result.parity.mean_kl < 2e-3
    rows, parts = rows_of(folder), stored(tmp_path / "b")
    shift = 0 if target == "native" else 8  # native stores them signed
    groups = rows.scales.shape[1]
    assert (fours(parts["codes"][1], 256) == ((rows.numbers.numpy() + shift) & 15)).all()
    assert (fours(parts["zeros"][1], groups) == ((rows.zeros.numpy() + shift) & 15)).all()
    assert parts["scales"][1] == rows.scales.contiguous().view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize(
    "folder", ["compressed-tensors-w8a8", "compressed-tensors-fp8-block", "compressed-tensors-nvfp4a16"]
)
def test_other_numbers_on_native(tmp_path, folder):
    result = export(DATA / folder, tmp_path / "b", ExportOptions(target="native"))
    assert result.parity.max_abs_error < 1e-5
    rows, parts = rows_of(folder), stored(tmp_path / "b")
    assert parts["codes"][1] == rows.numbers.view(torch.uint8).numpy().tobytes()


def test_symmetric_numbers_on_our_own_product(tmp_path):
    export(DATA / "compressed-tensors-w4-groups-of-32", tmp_path / "b", ExportOptions(target="cpu"))
    graph = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "BlockQuantizedMatMul" for node in graph.node) == 12


@pytest.mark.parametrize(
    ("folder", "target", "said"),
    [
        ("compressed-tensors-fp8", "ort", "take --target native, or say --precision int8"),
        ("gptq-4", "tensorrt-rtx", "take --target ort or cpu or native, or say --precision int8"),
        (
            "gptq-4-act-order",
            "ort",
            "act-order (g_idx), which no target stores as it is; say --precision int8",
        ),
    ],
)
def test_what_a_target_cannot_say(tmp_path, folder, target, said):
    with pytest.raises(ExportError) as caught:
        export(DATA / folder, tmp_path / "b", ExportOptions(target=target))
    assert said in str(caught.value)


def test_an_explicit_precision_quantizes_again(tmp_path):
    again = ExportOptions(target="ort", precision="int4")
    assert export(DATA / "gptq-4", tmp_path / "b", again).source["stored"].startswith("requantized to int4")
    assert cache_key(DATA / "gptq-4", again) != cache_key(DATA / "gptq-4", ExportOptions(target="ort"))
