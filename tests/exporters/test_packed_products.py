"""Products by our own operator: with the bias and the gate that follow them, on the stored values."""

from collections import Counter

import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint
from cpu_operators import needs_cpu_operators
from graphs import logits, lower, traced, written

from glm4_exporters.architecture import EMBEDDING, HEAD, MATRICES
from glm4_exporters.formats import FORMATS
from glm4_exporters.passes.packed_products import PackedProducts
from glm4_exporters.passes.quantize_weights import QuantizeWeights

SIZES = dict(intermediate_size=128)  # gate and up in whole panels
NAMES = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in MATRICES]


def operators(model):
    return Counter(node.op_type for node in model.graph)


@needs_cpu_operators
@pytest.mark.parametrize("name", ["int8", "int4-signed"])
def test_it_computes_what_matmulnbits_does(tmp_path, name):
    """Both round their inputs to 8 bits per block."""
    formats = dict.fromkeys([*NAMES, HEAD], FORMATS[name])
    source = write_checkpoint(tmp_path / "source", tiny_config(**SIZES))
    for products, path in (((PackedProducts,), tmp_path / "ours"), ((), tmp_path / "theirs")):
        model = lower(traced(**SIZES), "ort")
        for make in products:
            assert make(formats)(model).modified
        QuantizeWeights("fused", formats)(model)
        written(model, source, path)
    ours, theirs = logits(tmp_path / "ours"), logits(tmp_path / "theirs")
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)


def test_biases_and_the_gate_become_part_of_the_product():
    model = lower(traced(**SIZES), "cpu")
    before = operators(model)
    PackedProducts(dict.fromkeys(NAMES, FORMATS["int8"]))(model)
    after, gated = operators(model), [n for n in model.graph if n.attributes.get_int("gated", 0)]
    assert after["BlockQuantizedMatMul"] == len(NAMES)
    assert before["Add"] - after["Add"] == 6  # of q, k and v
    assert len(gated) == 2
    assert before["Sigmoid"] - after["Sigmoid"] == before["Split"] - after["Split"] == 2
    assert {str(node.name).rpartition("/")[0] for node in gated} == {
        f"model.layers.{i}.mlp" for i in range(2)
    }


def test_a_gate_in_parts_of_panels_stays_apart():
    model = lower(traced(), "cpu")  # 96 columns of gate, 96 of up
    PackedProducts(dict.fromkeys(NAMES, FORMATS["int8"]))(model)
    assert not [n for n in model.graph if n.attributes.get_int("gated", 0)]
    assert operators(model)["Sigmoid"] == 2


def test_other_formats_and_tied_heads_are_left():
    for name in ("int8-channel", "int8-sq", "fp8"):
        assert not PackedProducts(dict.fromkeys(NAMES, FORMATS[name]))(lower(traced(), "cpu")).modified
    tied = lower(traced(tie_word_embeddings=True), "cpu")
    assert not PackedProducts({EMBEDDING: FORMATS["int8"]})(tied).modified
