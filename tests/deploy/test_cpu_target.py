"""Bundles for our own CPU kernels: what is fused, what is refused, and rows that do not depend on their batch."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import rehash
from checkpoints import tiny_config, write_checkpoint
from cpu_operators import needs_cpu_operators

from glm4_deploy import doctor
from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.pieces import GraphPieces
from glm4_plugins import block_product
from glm4_runtime import Session
from glm4_runtime.bundle import read_manifest
from glm4_runtime.errors import BundleError, ExportError
from glm4_runtime.session import ort as ort_session

pytestmark = needs_cpu_operators

# One gate of whole panels, and heads whose products have one panel or several.
CONFIG = tiny_config(hidden_size=128, intermediate_size=192, vocab_size=512)
CPU = ExportOptions(target="cpu", max_batch_size=6, max_seq_len=256)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("cpu") / "checkpoint", CONFIG)


@pytest.fixture
def bundle(tmp_path, checkpoint):
    return export(checkpoint, tmp_path / "bundle", CPU).bundle


def test_bias_and_gate_are_part_of_the_product(bundle):
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    counts = Counter(node.op_type for node in model.graph.node)
    assert read_manifest(bundle).tensor_precisions["inputs of products"] == "int8, a scale per row and block"
    layers = CONFIG["num_hidden_layers"]
    assert counts[block_product.OPERATOR] == 6 * layers + 1
    assert not {"MatMulNBits", "Sigmoid", "Split"} & counts.keys()
    gated = [n for n in model.graph.node for a in n.attribute if a.name == "gated" and a.i]
    assert len(gated) == layers
    biased = [n for n in model.graph.node if n.op_type == block_product.OPERATOR and len(n.input) == 4]
    assert len(biased) == 3 * layers


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_step_of_several_has_the_bits_of_each_alone(tmp_path, checkpoint, precision):
    """Products, norms and attention of one row know nothing of the others: no tie can flip in a batch."""
    options = ExportOptions(target="cpu", precision=precision, max_batch_size=6, parity=False)
    bundle = export(checkpoint, tmp_path / "bundle", options).bundle
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 512, length).tolist() for length in (3, 17, 1, 40, 9)]
    with Session.open(bundle) as session:
        alone = {}
        for slot, prompt in enumerate(prompts):
            session.prefill(slot, prompt)
            alone[slot] = [session.decode({slot: 7})[slot] for _ in range(3)]
            session.release(slot)
        for slot, prompt in enumerate(prompts):
            session.prefill(slot, prompt)
        for step in range(3):
            together = session.decode(dict.fromkeys(range(len(prompts)), 7))
            for slot in together:
                np.testing.assert_array_equal(together[slot], alone[slot][step])


@pytest.mark.parametrize("cache", ["fp32", "fp16", "bf16", "int8"])
def test_a_prompt_has_the_same_bits_however_it_is_cut(tmp_path, cache):
    """So that a reused prefix, a chunk or a verified draft changes no token. Past one chunk of attention's keys, too."""
    longer = tiny_config(**CONFIG | {"max_position_embeddings": 512})
    checkpoint = write_checkpoint(tmp_path / "checkpoint", longer)
    options = ExportOptions(target="cpu", kv_cache=cache, max_batch_size=2, parity=False)
    bundle = export(checkpoint, tmp_path / "bundle", options).bundle
    ids = np.random.default_rng(2).integers(0, 512, 300).tolist()
    with Session.open(bundle) as session:
        whole = session.prefill(0, ids, logits="all")
        for chunk in (1, 37, 256):
            parts = np.concatenate(list(session.score(ids, chunk)))
            np.testing.assert_array_equal(parts, whole)
        session.copy_prefix(0, 1, 290)
        np.testing.assert_array_equal(session.prefill(1, ids[290:], logits="all"), whole[290:])
        session.truncate(1, 299)
        np.testing.assert_array_equal(session.decode({1: ids[299]})[1], whole[299])


def test_threads_do_not_change_a_bit(bundle):
    ids = np.random.default_rng(1).integers(0, 512, 100).tolist()  # three groups of rows
    found = []
    for threads in (1, 2):
        with Session.open(bundle, threads=threads) as session:
            found.append(np.concatenate(list(session.score(ids))))
    np.testing.assert_array_equal(*found)


def test_weights_are_read_where_they_lie(bundle):
    """The file's offsets are pages, so that ONNX Runtime maps it instead of copying."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name.endswith((".codes", ".scales")):
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert int(place["offset"]) % 4096 == 0


def test_a_head_in_parts_is_the_head(tmp_path, monkeypatch):
    """Of panels, the last of them short."""
    config = tiny_config(vocab_size=515)
    options = ExportOptions(target="cpu", kv_cache="fp32", parity=False)
    bundle = export(write_checkpoint(tmp_path / "checkpoint", config), tmp_path / "bundle", options).bundle
    ids = [5, 17, 300, 42]
    with Session.open(bundle) as session:
        whole = np.concatenate(list(session.score(ids)))
    monkeypatch.setattr("glm4_exporters.pieces.HEAD_ROWS", 128)
    cache = np.zeros((1, config["num_key_value_heads"], 8, config["head_dim"]), np.float32)
    batch = {
        "input_ids": np.array([ids]),
        "past_lengths": np.zeros(1, np.int32),
        "query_lengths": np.array([4], np.int32),
        "logits_indices": np.arange(4)[None],
    }
    for layer in range(config["num_hidden_layers"]):
        batch |= {f"past_key_values.{layer}.{side}": cache.copy() for side in ("key", "value")}
    found = GraphPieces(bundle).run([batch])[0]["logits"][0]
    np.testing.assert_allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": "fp32"}, "target cpu has no precision 'fp32'; it has int8, int4, int8-sq"),
        ({"activations": "fp16"}, "target cpu has no fp16 activations; it has fp32"),
    ],
)
def test_refused(tmp_path, checkpoint, options, reason):
    with pytest.raises(ExportError, match=reason):
        export(checkpoint, tmp_path / "b", ExportOptions(target="cpu", **options))
    assert not (tmp_path / "b").exists()


def test_without_a_compiler_nothing_is_hidden(tmp_path, checkpoint, bundle, monkeypatch):
    monkeypatch.setattr(ort_session, "OPERATOR_LIBRARY", "never_built")
    with pytest.raises(BundleError, match=r"were not built .* --target ort"):
        Session.open(bundle)
    monkeypatch.setattr("glm4_exporters.pieces.library", lambda: None)
    with pytest.raises(ExportError, match="were not built"):
        GraphPieces(bundle).run([{"input_ids": np.array([[1]])}])
    monkeypatch.setattr("glm4_plugins.block_product.library", lambda: None)
    with pytest.raises(ExportError, match=r"were not built .* --no-parity"):
        export(checkpoint, tmp_path / "b", CPU)
    options = ExportOptions(target="cpu", max_seq_len=256, max_batch_size=6, parity=False)
    without = export(checkpoint, tmp_path / "b", options).bundle
    assert (without / "model.onnx.data").read_bytes() == (bundle / "model.onnx.data").read_bytes()


def test_a_library_that_cannot_be_loaded_is_said_to_be_so(bundle, tmp_path, monkeypatch):
    damaged = tmp_path / "cpu_operators.so"
    damaged.write_bytes(b"of another platform")
    monkeypatch.setattr(ort_session, "operator_library", lambda: damaged)
    with pytest.raises(BundleError, match=r"cannot load .*cpu_operators"):
        Session.open(bundle)
    monkeypatch.setattr(block_product, "library", lambda: damaged)
    monkeypatch.setattr(block_product, "kernels", block_product.kernels.__wrapped__)
    found = next(f for f in doctor.examine()["findings"] if f["name"] == "run: target cpu")
    assert not found["works"]
    assert "cannot be loaded" in found["detail"]


def test_doctor_names_the_variable_that_asks_for_kernels_of_another_processor():
    code = "import json; from glm4_deploy import doctor; print(json.dumps(doctor.examine()['findings']))"
    asked = os.environ | {"GLM4_CPU_KERNELS": "sse9"}
    said = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True)
    found = next(f for f in json.loads(said.stdout) if f["name"] == "run: target cpu")
    assert not found["works"]
    assert "GLM4_CPU_KERNELS names kernels that this processor does not support" in found["detail"]
    assert found["advice"] == "unset GLM4_CPU_KERNELS"


def test_a_damaged_shape_is_refused_and_not_read_past(bundle, tmp_path):
    """The library does not trust the graph that names it."""
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    model = onnx.load(broken / "model.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == block_product.OPERATOR and len(n.input) == 3)
    next(a for a in node.attribute if a.name == "columns").i *= 4
    onnx.save(model, broken / "model.onnx")
    with Session.open(rehash(broken)) as session, pytest.raises(Exception, match="has not the shape"):
        session.prefill(0, [1, 2])
