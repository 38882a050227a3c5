"""A bundle with adapter slots that anybody wrote, and adapters that anybody wrote: refused in one line, or exact."""

import json
import random
import shutil

import numpy as np
import onnx
import pytest
from bundles import rehash
from cpu_operators import needs_cpu_operators
from onnx import TensorProto, helper

from glm4_runtime import BundleError, Session
from glm4_runtime.bundle import read_manifest
from glm4_runtime.errors import Glm4Error

pytestmark = needs_cpu_operators
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def forge(demo_slots, tmp_path):
    """A function that copies a bundle with slots, and changes its manifest and its graph with adapters."""

    def make(change=lambda _slots: None, graph=lambda _model: None):
        folder = shutil.copytree(demo_slots, tmp_path / "bundle")
        path = folder / "model.lora.onnx"
        model = onnx.load(path, load_external_data=False)
        graph(model)
        path.write_bytes(model.SerializeToString())
        data = json.loads((folder / "manifest.json").read_text())
        change(data["adapter_slots"])
        (folder / "manifest.json").write_text(json.dumps(data))
        return rehash(folder)

    return make


SLOTS = {
    "no slots": (lambda slots: slots.update(count=0), "adapter_slots.count is 0, but must be 1 ... 256"),
    "many slots": (lambda slots: slots.update(count=257), "adapter_slots.count is 257"),
    "a high rank": (lambda slots: slots.update(rank=1025), "adapter_slots.rank is 1025"),
    "no matrices": (lambda slots: slots.update(matrices={}), "adapter_slots.matrices"),
    "a vector": (lambda slots: slots["matrices"].update(lm_head=[3]), "which is no matrix"),
    "an empty matrix": (lambda slots: slots["matrices"].update(lm_head=[0, 3]), "lm_head is 0"),
    "a text": (lambda slots: slots.update(base=7), "adapter_slots.base is 7"),
    "an option": (lambda slots: slots.update(alpha=7), "has unknown alpha"),
    "other slots than the graph": (lambda slots: slots.update(count=2), "has other inputs than the manifest"),
    "fewer matrices than the graph": (lambda slots: slots["matrices"].popitem(), "has other inputs than the"),
}


@pytest.mark.parametrize("case", SLOTS)
def test_impossible_slots_are_refused(forge, case):
    change, message = SLOTS[case]
    with pytest.raises(BundleError, match="(?s)" + message) as caught:
        Session.open(forge(change))
    assert str(caught.value).isprintable()


def more_inputs(model):
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.INT64, ["batch"]))


def a_loop(model):
    model.graph.node.append(helper.make_node("Loop", ["input_ids"], ["x"]))


def another_matrix(model):
    for node in model.graph.node:
        if node.op_type == "LoraProduct":
            next(one for one in node.attribute if one.name == "matrix").i = 10_000


@pytest.mark.parametrize(
    ("graph", "message"), [(more_inputs, "other inputs"), (a_loop, "does not have .ai.onnx.Loop.")]
)
def test_another_graph_is_refused(forge, graph, message):
    with pytest.raises(BundleError, match=message):
        Session.open(forge(graph=graph))


def test_a_missing_graph_is_refused(forge):
    folder = forge()
    (folder / "model.lora.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.lora\.onnx is missing"):
        Session.open(folder)


def test_a_product_of_no_matrix_fails_one_request(forge, demo_adapters):
    with Session.open(forge(graph=another_matrix)) as session:
        expected = session.prefill(0, IDS)
        session.load_adapter("poet", demo_adapters["poet"])
        session.use_adapter(1, "poet")
        with pytest.raises(Glm4Error, match="places must be"):
            session.prefill(1, IDS)
        session.release(0)
        np.testing.assert_array_equal(session.prefill(0, IDS), expected)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_adapters_are_refused_in_one_line_or_leave_the_base_as_it_is(
    demo_slots, demo_adapters, tmp_path, seed
):
    """Random changes of the bytes of both files."""
    chance, session = random.Random(seed), Session.open(demo_slots)
    folder = shutil.copytree(demo_adapters["coder"], tmp_path / "damaged")
    path = folder / chance.choice(["adapter_config.json", "adapter_model.safetensors"])
    data = bytearray(path.read_bytes())
    header = min(len(data), 3000)
    for _ in range(chance.choice([1, 3])):
        at = chance.randrange(header)
        data[at : at + chance.choice([1, 4])] = chance.randbytes(chance.choice([0, 1, 4]))
    path.write_bytes(data)
    with session:
        expected = session.prefill(0, IDS)
        try:
            session.load_adapter("x", folder)
        except Glm4Error as error:
            assert str(error).isprintable()  # noqa: PT017  it may also be read
            assert len(str(error)) <= 500  # noqa: PT017
            assert list(session.adapters) == []
        session.release(0)
        np.testing.assert_array_equal(session.prefill(0, IDS), expected)


def test_the_manifest_lists_every_matrix_but_the_embedding(demo_slots):
    manifest = read_manifest(demo_slots)
    model, slots = manifest.model, manifest.adapter_slots
    tied = manifest.config["tie_word_embeddings"]
    assert len(slots.matrices) == 6 * model.num_layers + (not tied)
    assert "model.embed_tokens" not in slots.matrices
