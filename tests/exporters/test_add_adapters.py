"""Products of adapters: one operator of ours after each product, or standard operators."""

from collections import Counter

import pytest
from checkpoints import tiny_config
from graphs import lower, traced

from glm4_exporters.architecture import expected_tensors
from glm4_exporters.config import Glm4Config
from glm4_exporters.passes.add_adapters import AddAdapters
from glm4_runtime.bundle import AdapterSlots
from glm4_runtime.bundle.adapter_inputs import adapter_specs

SIZES = dict(intermediate_size=128)  # gate and up in whole panels


def slots(**sizes):
    tensors = expected_tensors(Glm4Config.from_dict(tiny_config(**sizes)), "causal-lm")
    matrices = {name.removesuffix(".weight"): shape for name, shape in tensors.items() if len(shape) == 2}
    del matrices["model.embed_tokens"]
    return AdapterSlots(2, 8, matrices)


def adapted(dialect, **sizes):
    model = traced(**sizes)
    before = Counter(node.op_type for node in model.graph)
    assert AddAdapters(slots(**sizes), dialect, "float32")(model).modified
    return model, Counter(node.op_type for node in model.graph) - before


def test_the_packed_form_is_one_operator_with_the_gate():
    model, added = adapted("cpu", **SIZES)
    assert added == {"LoraProduct": 13}  # six matrices of two layers, and the head
    products = [node for node in model.graph if node.op_type == "LoraProduct"]
    assert sorted(node.attributes.get_int("matrix") for node in products) == list(range(13))
    assert sum(node.attributes.get_int("gated") for node in products) == 2
    assert not [node for node in model.graph if node.op_type in ("Sigmoid", "Split")]
    assert model.graph.outputs[0].name == "logits"
    assert model.graph.outputs[0].producer().op_type == "LoraProduct"


def test_a_gate_in_parts_of_panels_stays_apart():
    model, _ = adapted("cpu")  # 96 columns of gate, 96 of up
    assert not [node for node in model.graph if node.attributes.get_int("gated", 0)]
    assert [node for node in model.graph if node.op_type == "Sigmoid"]


def test_the_stacked_form_has_standard_operators():
    model, added = adapted("native", **SIZES)
    assert added == {"Gather": 26, "Cast": 26, "MatMul": 26, "Add": 13}
    assert "glm4" in model.opset_imports  # of attention, until its own pass


@pytest.mark.parametrize("dialect", ["cpu", "native"])
def test_inputs_are_those_that_the_session_binds(dialect):
    model, _ = adapted(dialect)
    names = [value.name for value in model.graph.inputs]
    assert names[-len(adapter_specs(slots(), dialect)) :] == [s.name for s in adapter_specs(slots(), dialect)]


def test_a_tied_head_takes_no_adapter():
    _, added = adapted("cpu", tie_word_embeddings=True)
    assert added["LoraProduct"] == 12


def test_base_products_are_those_of_the_graph_without_adapters():
    """So that a row without an adapter has the same bits in both."""
    plain = lower(traced(**SIZES), "cpu")
    model, _ = adapted("cpu", **SIZES)
    lower(model, "cpu")
    kinds = [Counter(node.op_type for node in one.graph) for one in (plain, model)]
    for kind in ("FusedMatMul", "RMSNormalization", "SkipSimplifiedLayerNormalization", "Add"):
        assert kinds[0][kind] == kinds[1][kind], kind
