"""fp8 matrices in the data file: what is written for them, from which numbers, and how often they are read."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from checkpoints import random_tensors, tiny_config, write_checkpoint
from graphs import lower
from safetensors.torch import save_file

from glm4_exporters import weights as weights_module
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.formats import FORMATS
from glm4_exporters.formats.float8 import FLOAT8_MAX
from glm4_exporters.passes.quantize_weights import QuantizeWeights
from glm4_exporters.quantize.smooth import Smoothing
from glm4_exporters.trace import trace
from glm4_exporters.weights import Edits, attach, layout, write_weights
from glm4_runtime import ExportError

DOWN, GATE_UP = (f"model.layers.1.mlp.{name}.weight" for name in ("down_proj", "gate_up_proj"))
CONFIG = Glm4Config.from_dict(tiny_config())
TENSORS = random_tensors(CONFIG, "causal-lm", torch.float32, seed=0)


@pytest.fixture(scope="module")
def traced():
    return lower(trace(CONFIG, "causal-lm", "float16"), "native")


def written(model, folder, tensors=TENSORS, edits=None):
    """The graph's fp8 weights and scales, by name, as a runtime reads them."""
    model = model.clone()
    QuantizeWeights("standard", dict.fromkeys((DOWN, GATE_UP), FORMATS["fp8"]))(model)
    source = write_checkpoint(folder / "source", tiny_config())
    save_file(tensors, source / "model.safetensors")
    with Checkpoint.load(source) as checkpoint:
        places = layout(model)
        result = write_weights(checkpoint, places, folder / "weights", edits or Edits())
    attach(model, places, "weights")
    ir.save(model, folder / "model.onnx")
    found = ir.load(folder / "model.onnx").graph.initializers
    names = [name for name in found if name.startswith((DOWN, GATE_UP))]
    return {name: found[name].const_value.numpy() for name in names}, result


def expected(matrix):
    scale = np.float16(max(float(matrix.abs().max()) / FLOAT8_MAX, 2.0**-14))
    numbers = (matrix.float() / float(scale)).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
    return numbers.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), scale


def test_numbers_and_scales_are_those_of_the_largest_magnitude(traced, tmp_path):
    arrays, _ = written(traced, tmp_path)
    assert set(arrays) == {f"{name}.{part}" for name in (DOWN, GATE_UP) for part in ("codes", "scale")}
    for name in (DOWN, GATE_UP):
        numbers, scale = expected(TENSORS[name])
        assert (arrays[f"{name}.scale"].shape, arrays[f"{name}.scale"].dtype) == ((), np.float16)
        assert arrays[f"{name}.scale"] == scale
        assert (arrays[f"{name}.codes"].view(np.uint8) == numbers.view(np.uint8)).all()
        assert np.abs(arrays[f"{name}.codes"].astype(np.float32)).max() == FLOAT8_MAX


def test_the_scale_is_of_the_matrix_as_it_is_stored(traced, tmp_path):
    """Smoothed first; in many blocks, of which not the first holds the largest number."""
    rows = np.linspace(0.25, 64, TENSORS[DOWN].shape[0], dtype=np.float32)
    smoothing = Smoothing(rows={DOWN: rows})
    arrays, _ = written(traced, tmp_path, edits=Edits(smoothing))
    numbers, scale = expected(TENSORS[DOWN] * torch.from_numpy(rows)[:, None])
    assert arrays[f"{DOWN}.scale"] == scale
    assert (arrays[f"{DOWN}.codes"].view(np.uint8) == numbers.view(np.uint8)).all()


def test_blocks_change_nothing(traced, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole, first = written(traced, tmp_path / "whole")
    monkeypatch.setattr(weights_module, "READ_BUFFER_BYTES", 2 * 4096)
    monkeypatch.setattr(weights_module, "ENCODED_AT_ONCE", 640)
    (tmp_path / "parts").mkdir()
    parts, second = written(traced, tmp_path / "parts")
    assert all(whole[name].tobytes() == parts[name].tobytes() for name in whole)
    assert first == second  # the digest of the source, too: a matrix that is read twice counts once


def test_a_matrix_of_zeros_has_a_scale(traced, tmp_path):
    arrays, _ = written(traced, tmp_path, TENSORS | {DOWN: torch.zeros_like(TENSORS[DOWN])})
    assert arrays[f"{DOWN}.scale"] == 2.0**-14
    assert not arrays[f"{DOWN}.codes"].astype(np.float32).any()


def test_a_scale_beyond_float16_is_refused(traced, tmp_path):
    huge = TENSORS[DOWN].clone()
    huge[3, 5] = 1e9
    with pytest.raises(
        ExportError,
        match=r"scale of tensor .*down_proj\.weight is beyond float16's 65504; .*--activations bf16",
    ):
        written(traced, tmp_path, TENSORS | {DOWN: huge})
