"""Piece by piece is the whole: the same outputs as one ONNX Runtime session, with one layer in memory at a time."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from checkpoints import tiny_config, write_checkpoint

from glm4_deploy.parity import graph_inputs
from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters import pieces
from glm4_exporters.pieces import GraphPieces
from glm4_runtime.bundle import read_manifest

TASKS = ("causal-lm", "sequence-classification", "token-classification", "encoder")
SEQUENCES = ([5, 6, 5, 319, 0], [7], list(range(40, 70)))


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory):
    """A function that exports a random checkpoint of a task, once for each set of arguments."""
    folder, made = tmp_path_factory.mktemp("pieces"), {}

    def make(task="causal-lm", target="ort", precision="fp32", dtype="float32", **overrides):
        key = json.dumps([task, target, precision, dtype, overrides])
        if key not in made:
            checkpoint = write_checkpoint(
                folder / f"checkpoint{len(made)}", tiny_config(**overrides), task=task, dtype=dtype
            )
            options = ExportOptions(target=target, precision=precision, parity=False)
            made[key] = export(checkpoint, folder / f"bundle{len(made)}", options).bundle
        return made[key]

    return make


def inputs_of(bundle):
    manifest = read_manifest(bundle)
    return [graph_inputs(manifest, ids) for ids in SEQUENCES]


def whole(bundle, inputs):
    session = ort.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, batch), strict=True)) for batch in inputs]


def assert_same(actual, wanted, atol):
    assert len(actual) == len(wanted)
    for one, other in zip(actual, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_allclose(one[name], other[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("target", ["ort", "native"])
@pytest.mark.parametrize("task", TASKS)
def test_pieces_compute_what_the_whole_graph_computes(bundle_of, task, target):
    bundle = bundle_of(task, target)
    inputs = inputs_of(bundle)
    parts = GraphPieces(bundle)
    layers = [f"layer {i} {stage}" for i in range(2) for stage in ("attention", "gate_up", "down")]
    last = ["head"] if task == "encoder" else ["norm", "head"]  # an encoder ends with its norm
    assert [piece.name for piece in parts.pieces] == ["embedding", *layers, *last]
    assert_same(parts.run(inputs), whole(bundle, inputs), atol=1e-5)
    assert parts.arithmetic == "as exported"


@pytest.mark.parametrize("target", ["ort", "native"])
def test_a_tied_head_and_float16(bundle_of, target):
    bundle = bundle_of("causal-lm", target, "fp16", tie_word_embeddings=True)
    inputs = inputs_of(bundle)
    assert_same(GraphPieces(bundle).run(inputs), whole(bundle, inputs), atol=4e-2)


def test_bfloat16_is_computed_in_float32_from_the_stored_weights(bundle_of):
    """A checkpoint in bfloat16 exported to bf16 and to fp32 holds the same weights, but for the rotary tables."""
    narrow, wide = (bundle_of("causal-lm", "ort", p, "bfloat16") for p in ("bf16", "fp32"))
    parts = GraphPieces(narrow)
    assert parts.arithmetic == "float32"
    logits = [batch["logits"] for batch in parts.run(inputs_of(narrow))]
    wanted = [batch["logits"] for batch in whole(wide, inputs_of(wide))]
    assert all(array.dtype == np.float32 for array in logits)
    np.testing.assert_array_less(
        [np.abs(a - b).max() for a, b in zip(logits, wanted, strict=True)], [0.1] * 3
    )
    np.testing.assert_allclose(logits[1], wanted[1], atol=1e-5)  # one position: nothing is rotated


@pytest.mark.parametrize("rows", [40, 100, 319, 320, 321])
def test_the_head_in_blocks_of_rows(bundle_of, monkeypatch, rows):
    bundle = bundle_of()
    inputs = inputs_of(bundle)[:1]
    wanted = GraphPieces(bundle).run(inputs)
    monkeypatch.setattr(pieces, "HEAD_ROWS", rows)
    assert_same(GraphPieces(bundle).run(inputs), wanted, atol=1e-5)


def test_a_tied_head_in_blocks_of_rows(bundle_of, monkeypatch):
    bundle = bundle_of("causal-lm", "native", "fp16", tie_word_embeddings=True)
    inputs = inputs_of(bundle)
    wanted = GraphPieces(bundle).run(inputs)
    monkeypatch.setattr(pieces, "HEAD_ROWS", 90)
    assert_same(GraphPieces(bundle).run(inputs), wanted, atol=1e-2)


def test_one_layers_weights_at_a_time_and_each_read_once(bundle_of, monkeypatch):
    bundle = bundle_of()
    order, rows_read, bytes_of_piece = [], {}, {}
    real_read, real_run = GraphPieces._read, GraphPieces.run_piece

    def read(self, name, rows=None):
        array = real_read(self, name, rows)
        order.append((current[-1], name))
        rows_read.setdefault(name, []).append(None if rows is None else rows.tolist())
        bytes_of_piece[current[-1]] = bytes_of_piece.get(current[-1], 0) + array.data.nbytes
        return array

    current = []

    def run(self, piece, values):
        current.append(piece.name)
        return real_run(self, piece, values)

    monkeypatch.setattr(GraphPieces, "_read", read)
    monkeypatch.setattr(GraphPieces, "run_piece", run)
    monkeypatch.setattr(pieces, "HEAD_ROWS", 128)
    GraphPieces(bundle).run(inputs_of(bundle))
    weights = [name for name in rows_read if name.endswith((".weight", ".bias"))]
    assert len(weights) == 3 + 2 * 13  # a layer: six matrices, three biases, four norms
    for piece, name in order:
        if name.startswith("model.layers."):
            matrix = name.split(".")[-2]
            stage = {"gate_up_proj": "gate_up", "down_proj": "down", "post_mlp_layernorm": "down"}.get(
                matrix, "attention"
            )
            assert piece == f"layer {name.split('.')[2]} {stage}"
    used = sorted({i for ids in SEQUENCES for i in ids})
    assert rows_read["model.embed_tokens.weight"] == [used]
    assert [len(rows) for rows in rows_read["lm_head.weight"]] == [128, 128, 64]
    assert all(len(times) == 1 for name, times in rows_read.items() if name.startswith("model.layers."))
    # The largest matrix here, the head's, is 20,480 parameters; the whole model is 116,000.
    assert max(bytes_of_piece.values()) < 0.2 * (bundle / "model.onnx.data").stat().st_size


def test_values_that_nobody_reads_again_are_dropped(bundle_of, monkeypatch):
    kept = []
    real = GraphPieces.run_piece

    def run(self, piece, values):
        kept.append(sorted(name for name in values[0] if name.startswith("model.layers.0")))
        return real(self, piece, values)

    monkeypatch.setattr(GraphPieces, "run_piece", run)
    GraphPieces(bundle_of()).run(inputs_of(bundle_of()))
    assert kept[4]  # layer 1's attention reads what layer 0 made
    assert kept[7] == []


def test_every_node_is_in_exactly_one_piece(bundle_of):
    for task in TASKS:
        bundle = bundle_of(task, "native")
        nodes = onnx.load(bundle / "model.onnx", load_external_data=False).graph.node
        cut = [node.name for piece in GraphPieces(bundle).pieces for node in piece.nodes]
        assert sorted(cut) == sorted(node.name for node in nodes)


def test_progress_ends_at_the_whole(bundle_of):
    said = []
    GraphPieces(bundle_of()).run(inputs_of(bundle_of()), lambda *what: said.append(what))
    assert said == [("run the bundle's layers", i, 9) for i in range(10)]
