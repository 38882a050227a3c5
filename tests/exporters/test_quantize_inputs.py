"""Inputs of products rounded under one scale: what is shared, in which type, and what it computes."""

from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint
from graphs import logits, lower, traced, written

from glm4_exporters.architecture import MATRICES
from glm4_exporters.formats import FORMATS
from glm4_exporters.passes.quantize_inputs import QuantizeInputs
from glm4_exporters.passes.quantize_weights import QuantizeWeights
from glm4_runtime.errors import ExportError

NAMES = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in MATRICES]


def quantized(name, scales, *, unsigned=False):
    model = lower(traced(), "native")
    QuantizeWeights("standard", dict.fromkeys(NAMES, FORMATS[name]))(model)
    QuantizeInputs(scales, unsigned=unsigned)(model)
    return model


@pytest.mark.parametrize(
    ("name", "unsigned", "zero"),
    [
        ("int8-sq", False, np.int8(0)),
        ("int8-sq", True, np.uint8(128)),
        ("fp8", False, ml_dtypes.float8_e4m3fn(0)),
        ("fp8", True, ml_dtypes.float8_e4m3fn(0)),
    ],
)
def test_what_stands_for_zero_decides_the_type(name, unsigned, zero):
    model = quantized(name, dict.fromkeys(NAMES, 0.05), unsigned=unsigned)
    found = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len(found) == 4 * 2  # q, k and v read one input
    for node in found:
        assert node.inputs[2].const_value.numpy() == zero
        assert node.inputs[2].const_value.numpy().dtype == zero.dtype
        assert node.inputs[1].const_value.numpy() == np.float32(0.05)


def test_products_of_one_input_and_two_scales_round_it_twice():
    scales = dict.fromkeys(NAMES, 0.05) | {"model.layers.0.self_attn.k_proj.weight": 0.06}
    found = Counter(node.op_type for node in quantized("int8-sq", scales).graph)
    assert found["QuantizeLinear"] == 4 * 2 + 1


@pytest.mark.parametrize("name", ["int8-sq", "fp8"])
def test_fine_scales_change_little_and_coarse_ones_much(tmp_path, name):
    source = write_checkpoint(tmp_path / "source", tiny_config())
    exact = quantized(name, {})
    written(exact, source, tmp_path / "exact")
    wanted, steps = logits(tmp_path / "exact", as_written=True), FORMATS[name].inputs.largest
    errors = []
    for label, largest in (("fine", 8.0), ("coarse", 0.2)):
        model = quantized(name, dict.fromkeys(NAMES, largest / steps), unsigned=True)
        written(model, source, tmp_path / label)
        errors.append(
            np.linalg.norm(logits(tmp_path / label, as_written=True) - wanted) / np.linalg.norm(wanted)
        )
    assert 0 < errors[0] < 0.15 < 0.3 < errors[1]


def test_a_matrix_that_no_product_reads_is_refused():
    with pytest.raises(ExportError, match=r"no product of the graph reads model\.layers\.9\.x"):
        quantized("int8-sq", {"model.layers.9.x": 0.1})
