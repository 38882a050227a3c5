"""KV caches of other types than the activations': what exports record and refuse, and what the demo loses."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from checkpoints import tiny_config, write_checkpoint
from click.testing import CliRunner
from cpu_operators import needs_cpu_operators

from glm4_deploy.cli import cli
from glm4_deploy.inspect import inspect
from glm4_deploy.metrics import kl_divergence, log_softmax
from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_deploy.texts import LINES, cut_text
from glm4_exporters.quantize.kv_cache import MARGIN
from glm4_runtime import Session
from glm4_runtime.bundle import read_manifest
from glm4_runtime.errors import BundleError, ExportError

DEMO = Path(__file__).parents[2] / "demo"
INT8 = ExportOptions(precision="fp32", kv_cache="int8", parity=False)


def scales_of(bundle):
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    return {
        t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("y_scale")
    }


def test_manifest_report_and_bytes(tmp_path, tiny_checkpoint):
    bundles = [export(tiny_checkpoint, tmp_path / name, INT8) for name in ("one", "two")]
    manifest = bundles[0].manifest
    assert manifest.kv_cache == "int8"
    assert manifest.activations == "float32"
    assert manifest.providers == ("CPUExecutionProvider",)
    caches = [spec.dtype for spec in (*manifest.inputs, *manifest.outputs) if "key_values" in spec.name]
    assert caches == ["int8"] * 8
    report = json.loads((bundles[0].bundle / "report.json").read_text())["calibration"]
    assert report["kv_cache"] == {"scales": "per head and channel, of K and of V apart", "margin": MARGIN}
    assert report["text"] == "random ids, for want of a tokenizer"
    one, two = (
        {
            p.name: hashlib.sha256(p.read_bytes()).digest()
            for p in b.bundle.iterdir()
            if p.name != "report.json"
        }
        for b in bundles
    )
    assert one == two


def test_the_text_decides_the_scales_and_the_key(tmp_path, tiny_checkpoint):
    quiet, loud = tmp_path / "quiet.ids", tmp_path / "loud.ids"
    quiet.write_text("5 6 7 8\n")
    loud.write_text(" ".join(str(i) for i in range(200)) + "\n")
    options = [ExportOptions(precision="fp32", kv_cache="int8", parity=False, calibration=str(p)) for p in (quiet, loud)]  # fmt: skip
    small, large = (
        scales_of(export(tiny_checkpoint, tmp_path / str(i), option).bundle)
        for i, option in enumerate(options)
    )
    assert small.keys() == large.keys()
    assert all((small[name].max() < large[name].max()) for name in small)
    plain = ExportOptions(precision="fp32", parity=False)
    keys = [cache_key(tiny_checkpoint, option) for option in (*options, INT8, plain)]
    assert len(set(keys)) == 4
    moved = tmp_path / "elsewhere.ids"
    moved.write_bytes(quiet.read_bytes())
    again = ExportOptions(precision="fp32", kv_cache="int8", parity=False, calibration=str(moved))
    assert cache_key(tiny_checkpoint, again) == keys[0]
    quiet.write_text("5 6 7 9\n")
    assert cache_key(tiny_checkpoint, options[0]) != keys[0]


@pytest.mark.parametrize(
    ("overrides", "options", "reason"),
    [
        ({}, {"target": "native"}, "target native has no operator with an int8 cache"),
        ({}, {"precision": "bf16"}, "fp32 and fp16 activations only"),
        ({}, {"precision": "int8", "activations": "bf16"}, "fp32 and fp16 activations only"),
        ({"head_dim": 12}, {}, "heads of multiples of 8 dims, and this model's have 12"),
        ({}, {"task": "encoder"}, "task encoder has no cache"),
    ],
)
def test_refused_before_the_work(tmp_path, monkeypatch, overrides, options, reason):
    from glm4_exporters.checkpoint import Checkpoint

    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_config(**overrides))
    monkeypatch.setattr(Checkpoint, "row_blocks", None)  # no weight is read
    with pytest.raises(ExportError, match=reason):
        export(
            checkpoint, tmp_path / "b", ExportOptions(**{"precision": "fp32", "kv_cache": "int8"} | options)
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("head", [{"head_dim": 24, "partial_rotary_factor": 2 / 3}, {"head_dim": 8}])
def test_heads_that_the_kernel_does_not_rotate(tmp_path, head):
    """RoPE stands before the operator; the cache is int8 all the same, and parity holds."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_config(**head))
    result = export(checkpoint, tmp_path / "b", ExportOptions(precision="fp32", kv_cache="int8"))
    assert result.manifest.kv_cache == "int8"
    assert result.parity.mean_kl < 2e-4


def test_the_command_says_what_it_was_calibrated_on(tmp_path, tiny_checkpoint):
    arguments = ["export", str(tiny_checkpoint), str(tmp_path / "b"), "--precision", "fp32", "--no-parity"]
    result = CliRunner().invoke(cli, [*arguments, "--kv-cache", "int8"])
    assert result.exit_code == 0, result.output
    assert f"int8, calibrated on {len(LINES) * 64} tokens: random ids" in " ".join(result.output.split())
    wrong = CliRunner().invoke(cli, [*arguments, "--kv-cache", "int4"])
    assert wrong.exit_code == 2
    assert "'int4' is not one of 'auto', 'fp32', 'fp16', 'bf16', 'int8', 'fp8'" in wrong.output


def test_the_demo_loses_at_most_three_thousandths_of_perplexity(tmp_path, demo_bundle):
    """With weights in int8 as well, and scales from our few built-in lines."""
    folder = tmp_path / "demo"
    export(DEMO / "glm4-tiny", folder, ExportOptions(precision="int8", kv_cache="int8", parity=False))
    losses = []
    for bundle in (demo_bundle, folder):
        with Session.open(bundle, max_batch_size=1) as session:
            text = (DEMO / "heldout.txt").read_text()
            losses.append(
                np.concatenate(
                    [nll(session, ids) for ids in cut_text(text, session.tokenizer, 512)[::4]]
                ).mean()
            )
    assert -0.003 < np.expm1(losses[1] - losses[0]) < 0.003


def nll(session, ids):
    """Negative log likelihood of every token but the first."""
    logits = np.concatenate(list(session.score(ids))).astype(np.float64)[:-1]
    logits -= logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]


# Target cpu ---------------------------------------------------------------------------------------

# Name in the manifest, element type, elements of a row of 16 channels, and the largest mean KL against a float32 cache.
OF_CPU = {
    "fp32": ("float32", "float32", 16, 0.0),
    "fp16": ("float16", "float16", 16, 3e-4),
    "bf16": ("bfloat16", "bfloat16", 16, 3e-4),
    "int8": ("int8-rows", "int8", 20, 3e-4),
}


@pytest.fixture(scope="module")
def cpu_bundles(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("caches of cpu")
    for cache in OF_CPU:
        export(tiny_checkpoint, folder / cache, ExportOptions(target="cpu", kv_cache=cache, max_batch_size=4))
    return folder


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(4, 300, count).tolist()


@needs_cpu_operators
@pytest.mark.parametrize("cache", OF_CPU)
def test_target_cpu_takes_each_cache_without_a_text(cpu_bundles, cache):
    manifest = read_manifest(cpu_bundles / cache)
    name, element, width, _ = OF_CPU[cache]
    assert manifest.kv_cache == name
    specs = [spec for spec in (*manifest.inputs, *manifest.outputs) if "key_values" in spec.name]
    assert {(spec.dtype, spec.shape[3]) for spec in specs} == {(element, width)}
    report = json.loads((cpu_bundles / cache / "report.json").read_text())
    assert report["calibration"] == "nothing was calibrated"
    bytes_of = {"fp32": 4 * 16, "fp16": 2 * 16, "bf16": 2 * 16, "int8": 20}
    found = inspect(cpu_bundles / cache)["kv_bytes_per_token"]
    assert found == 2 * 2 * 2 * bytes_of[cache]  # layers, heads, keys and values


@needs_cpu_operators
@pytest.mark.parametrize("cache", OF_CPU)
def test_bits_depend_on_no_chunk_no_batch_and_no_reuse(cpu_bundles, cache):
    tokens = ids(60)
    with Session.open(cpu_bundles / cache) as session:
        whole = session.prefill(0, tokens, logits="all")
        session.prefill_chunk = 7
        np.testing.assert_array_equal(session.prefill(1, tokens, logits="all"), whole)
        session.copy_prefix(1, 2, 33)
        np.testing.assert_array_equal(session.prefill(2, tokens[33:], logits="all"), whole[33:])
        session.truncate(0, 20)
        session.prefill(3, ids(40, seed=1))
        for position in range(20, 26):  # rows move, as the set of slots changes
            others = {3: position} if position % 2 else {1: position, 3: position}
            found = session.decode({0: tokens[position], **others})
            np.testing.assert_array_equal(found[0], whole[position])
        block = session.read_positions(1, 0, 60)
    with Session.open(cpu_bundles / cache, threads=1) as session:
        session.append_positions(0, block)
        session.truncate(0, 59)
        np.testing.assert_array_equal(session.decode({0: tokens[59]})[0], whole[59])


@needs_cpu_operators
@pytest.mark.parametrize("cache", OF_CPU)
def test_a_narrow_cache_is_near_a_wide_one(cpu_bundles, cache):
    """And the graph in pieces, which parity and validate run, rounds as the session does."""
    from glm4_deploy.parity import graph_inputs
    from glm4_exporters.pieces import GraphPieces

    tokens, logits = ids(60), {}
    for name in {"fp32", cache}:
        with Session.open(cpu_bundles / name) as session:
            logits[name] = session.prefill(0, tokens, logits="all")
    folder = cpu_bundles / cache
    pieces = GraphPieces(folder).run([graph_inputs(read_manifest(folder), tokens)])[0]["logits"][0]
    np.testing.assert_array_equal(pieces, logits[cache])
    kl = kl_divergence(log_softmax(logits["fp32"]), log_softmax(logits[cache])).mean()
    assert kl <= OF_CPU[cache][3]
    assert (kl > 0) == (cache != "fp32")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "ort", "precision": "fp32", "kv_cache": "fp16"}, "no operator with an fp16 cache; other targets than cpu"),
        ({"target": "native", "precision": "fp16", "kv_cache": "fp32"}, "no operator with an fp32 cache"),
        ({"target": "cpu", "kv_cache": "fp8"}, "no operator with an fp8 cache; target tensorrt has"),
    ],
)  # fmt: skip
def test_a_type_that_the_target_lacks_is_refused(tmp_path, tiny_checkpoint, options, reason):
    with pytest.raises(ExportError, match=reason):
        export(tiny_checkpoint, tmp_path / "b", ExportOptions(**options))


def test_the_type_of_the_activations_may_be_named(tmp_path, tiny_checkpoint):
    options = ExportOptions(target="native", precision="fp16", kv_cache="fp16", parity=False)
    assert export(tiny_checkpoint, tmp_path / "b", options).manifest.kv_cache == "float16"


@needs_cpu_operators
def test_an_int8_cache_of_fixed_scales_is_not_opened(tmp_path, cpu_bundles):
    """As earlier exports for target cpu wrote it."""
    folder = tmp_path / "b"
    shutil.copytree(cpu_bundles / "int8", folder)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"int8-rows"', '"int8"'))
    with pytest.raises(BundleError, match=r'kv_cache is "int8", but must be one of float32, .*int8-rows'):
        read_manifest(folder)
