"""Exports with an int8 KV cache: what they record, what they refuse, and what the demo loses."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from checkpoints import tiny_config, write_checkpoint
from click.testing import CliRunner
from cpu_operators import needs_cpu_operators

from glm4_deploy.cli import cli
from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_deploy.texts import LINES, cut_text
from glm4_exporters.quantize.kv_cache import MARGIN
from glm4_runtime import Session
from glm4_runtime.errors import ExportError

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
    assert "'int4' is not one of 'auto', 'int8'" in wrong.output


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


@needs_cpu_operators
def test_the_cpu_target_has_one_too(tmp_path, tiny_checkpoint):
    options = ExportOptions(target="cpu", kv_cache="int8")
    result = export(tiny_checkpoint, tmp_path / "b", options)
    assert result.manifest.kv_cache == "int8"
    assert result.parity.mean_kl < 2e-3
