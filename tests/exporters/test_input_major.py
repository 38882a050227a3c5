"""Integer weights [in, out] in the data file: the same numbers, each weight in its place."""

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import tiny_config, write_checkpoint
from graphs import logits, lower, written

from glm4_exporters.config import Glm4Config
from glm4_exporters.formats import FORMATS, Integers
from glm4_exporters.passes.input_major import InputMajor
from glm4_exporters.passes.quantize_weights import QuantizeWeights
from glm4_exporters.trace import trace

CONFIG = Glm4Config.from_dict(tiny_config(num_hidden_layers=1))
ALONE = ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
TOGETHER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
NAMES = [f"model.layers.0.{name}.weight" for name in (*ALONE, *TOGETHER)] + ["lm_head.weight"]


@pytest.fixture(scope="module")
def traced():
    return lower(trace(CONFIG, "causal-lm", "float16"), "native")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", tiny_config(num_hidden_layers=1))


def quantized(traced, form):
    model = traced.clone()
    QuantizeWeights("standard", dict.fromkeys(NAMES, form))(model)
    return model


@pytest.mark.parametrize("name", ["int8-channel", "int4"])
def test_weights_of_lone_products_are_transposed(traced, source, tmp_path, name):
    rows = written(quantized(traced, FORMATS[name]), source, tmp_path / "rows")
    model = quantized(traced, FORMATS[name])
    assert InputMajor()(model).modified
    left = [node.name for node in model.graph if node.op_type == "Transpose" and "proj" in node.name]
    assert len(left) == len(TOGETHER)
    columns = written(model, source, tmp_path / "columns")
    for weight in NAMES:
        turned = not any(name in weight for name in TOGETHER)
        for part in ("codes", "scales"):
            one, other = (tensors[f"{weight}.{part}"].const_value.numpy() for tensors in (rows, columns))
            np.testing.assert_array_equal(one.T if turned else one, other)
    np.testing.assert_allclose(
        *(logits(tmp_path / name, as_written=True) for name in ("columns", "rows")), rtol=1e-2, atol=1e-2
    )
    assert not InputMajor()(model).modified


@pytest.mark.parametrize(
    "form",
    [Integers(8, 32, (1.0,)), Integers(4, None, (1.0,)), FORMATS["fp8"]],
    ids=["int8 in blocks", "int4 per row", "fp8"],
)
def test_other_weights_stay_as_they_are(traced, form):
    assert not InputMajor()(quantized(traced, form)).modified


def test_int4_of_an_odd_number_of_rows_stays_as_it_is(traced):
    model = quantized(traced, FORMATS["int4"])
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.INT4:
            value.shape = ir.Shape([7, value.shape[1]])
    assert not InputMajor()(model).modified


def test_a_weight_of_two_readers_stays_as_it_is(traced):
    model = quantized(traced, FORMATS["int8-channel"])
    wide = [node.outputs[0] for node in model.graph if node.op_type == "DequantizeLinear"]
    for value in wide:
        model.graph.append(ir.node("Neg", [value], name=f"{value.name}/reader"))
    assert not InputMajor()(model).modified


def test_parts_may_lie_in_any_order(traced, source, tmp_path):
    """Scales in front of their codes, and a matrix's parts far from one another."""
    plain = quantized(traced, FORMATS["int8-channel"])
    whole = written(plain, source, tmp_path / "plain")
    model = quantized(traced, FORMATS["int8-channel"])
    tensors = dict(model.graph.initializers)
    for name in tensors:
        model.graph.initializers.pop(name)
    for name in sorted(tensors, key=lambda name: (not name.endswith("scales"), name)):
        model.graph.initializers[name] = tensors[name]
    other = written(model, source, tmp_path / "other")
    assert next(iter(other)).endswith("scales")
    for name, value in whole.items():
        if value.const_value is not None:
            np.testing.assert_array_equal(value.const_value.numpy(), other[name].const_value.numpy())
