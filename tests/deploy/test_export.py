"""Export: the same bytes each time, all or nothing on the disk, and what transformers computes."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import tiny_config, write_checkpoint

from glm4_deploy import pipeline, tools
from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime import SamplingParams, Session
from glm4_runtime.errors import CheckpointError, ExportError

FAST = ExportOptions(precision="fp32", parity=False)
ROOT = Path(__file__).parents[2]


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


# The same bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_two_exports_are_byte_identical_apart_from_the_report(
    tmp_path, traced_anew, tiny_checkpoint, precision
):
    options = ExportOptions(precision=precision, parity=False)
    copy = tmp_path / "another place" / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    export(tiny_checkpoint, tmp_path / "one", options)
    time.sleep(1.1 * (precision == "fp32"))  # the report's time is in seconds: another moment, once
    export(copy, tmp_path / "two", options)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.pop("report.json") != two.pop("report.json") or precision != "fp32"
    assert one == two
    everything = b"".join((tmp_path / "two" / name).read_bytes() for name in ("manifest.json", "model.onnx"))
    assert b"another place" not in everything
    assert str(ROOT).encode() not in everything


def test_shards_do_not_change_the_bundle(tmp_path, tiny_checkpoint):
    sharded = write_checkpoint(tmp_path / "sharded", tiny_config(), shards=3)
    one = export(tiny_checkpoint, tmp_path / "one", FAST).bundle
    two = export(sharded, tmp_path / "two", FAST).bundle
    assert contents(one) | {"report.json": ""} == contents(two) | {"report.json": ""}


def test_side_files_come_along(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "notes.txt").write_text("not ours to copy")
    bundle = export(folder, tmp_path / "bundle", FAST).bundle
    assert {p.name for p in bundle.iterdir()} == {
        *("manifest.json", "report.json", "model.onnx", "model.onnx.data"),
        *("generation_config.json", "chat_template.jinja"),
    }
    assert (bundle / "chat_template.jinja").read_text() == "{{ messages }}"


# All or nothing -----------------------------------------------------------------------------------


def test_too_little_disk_is_refused_before_a_weight_is_read(tmp_path, tiny_checkpoint, monkeypatch):
    usage = namedtuple("usage", "total used free")
    size = export(tiny_checkpoint, tmp_path / "fits", FAST).manifest.files["model.onnx.data"].bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda *_: usage(10**9, 10**9 - size + 1, size - 1))
    monkeypatch.setattr(Checkpoint, "row_blocks", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ExportError, match=r"writes 0\.0 GB below .*, which has 0\.0 GB free; make room"):
        export(tiny_checkpoint, tmp_path / "bundle", FAST)
    assert left_in(tmp_path) == ["fits"]


@pytest.mark.parametrize("victim", ["weights", "graph", "manifest", "side file"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, tiny_checkpoint, monkeypatch, victim):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(*_, **__):
        raise full

    import onnx_ir

    owner, name = {
        "weights": (os, "pwrite"),
        "graph": (onnx_ir, "save"),
        "manifest": (pipeline, "write_manifest"),
        "side file": (shutil, "copyfile"),
    }[victim]
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(ExportError, match=r"could not be written to .*No space left on device"):
        export(tiny_checkpoint, tmp_path / "bundle", FAST)
    assert left_in(tmp_path) == []


# Options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions(max_seq_len=0), r"max_seq_len is 0, but this model has 1 \.\.\. 256 positions"),
        (ExportOptions(max_seq_len=257), "max_seq_len is 257"),
        (ExportOptions(max_seq_len=-1), "max_seq_len is -1"),
        (ExportOptions(max_batch_size=0), "max_batch_size is 0, but must be at least 1"),
        (ExportOptions(target="coreml"), "unknown target 'coreml'; the targets are ort, cpu, native"),
        (ExportOptions(precision="int3"), "target ort has no precision 'int3'; it has fp32, fp16, bf16"),
        (ExportOptions(task="chat"), "there is no task 'chat'; the tasks are causal-lm"),
        (ExportOptions(task="sequence-classification"), "score"),
    ],
)
def test_options_that_cannot_be(tmp_path, tiny_checkpoint, options, message):
    with pytest.raises((ExportError, CheckpointError), match=message):
        export(tiny_checkpoint, tmp_path / "bundle", options)
    with pytest.raises((ExportError, CheckpointError), match=message):
        cache_key(tiny_checkpoint, options)
    assert left_in(tmp_path) == []


def test_limits_are_the_options(tmp_path, tiny_checkpoint):
    options = ExportOptions(precision="fp32", parity=False, max_seq_len=20, max_batch_size=3)
    export(tiny_checkpoint, tmp_path / "bundle", options)
    with Session.open(tmp_path / "bundle") as session:
        assert (session.max_seq_len, session.max_batch_size) == (20, 3)
        # prompt and continuation together never pass the limit
        assert len(list(session.generate([5] * 18, SamplingParams(ignore_eos=True)))) == 2


@pytest.mark.parametrize("missing", ["onnxscript", "onnxruntime"])
def test_what_is_not_installed_is_said_before_the_work(tmp_path, tiny_checkpoint, monkeypatch, missing):
    from importlib import metadata, util

    real_version, real_spec = metadata.version, util.find_spec

    def version(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(tools, "version", version)
    monkeypatch.setattr(tools, "find_spec", lambda n: None if n == missing else real_spec(n))
    monkeypatch.setattr(pipeline, "_trace", lambda *_: pytest.fail("the work began"))
    with pytest.raises(ExportError, match=rf"{missing} is not installed.*pip install .*\["):
        export(tiny_checkpoint, tmp_path / "bundle", ExportOptions(precision="fp32"))


# What transformers computes -----------------------------------------------------------------------

SHAPES = {
    "odd heads": dict(
        hidden_size=52, num_attention_heads=3, num_key_value_heads=1, head_dim=13, intermediate_size=77,
        vocab_size=331,
    ),
    "eight kv heads, no bias": dict(
        hidden_size=72, num_attention_heads=16, num_key_value_heads=8, head_dim=8, intermediate_size=51,
        vocab_size=517, attention_bias=False,
    ),
    "tied, rotated by the kernel": dict(
        hidden_size=64, num_attention_heads=6, num_key_value_heads=2, head_dim=32, intermediate_size=96,
        vocab_size=257, tie_word_embeddings=True,
    ),
    "24 dims a head, yarn": dict(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=24, intermediate_size=33,
        vocab_size=301, max_position_embeddings=256,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, partial_rotary_factor=0.5, factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
}  # fmt: skip


def save_transformers(kind, folder, seed, **shape):
    """A random model of transformers' own, saved by it; norms and biases are not left at one and zero."""
    config = transformers.Glm4Config(
        **dict(
            num_hidden_layers=2, max_position_embeddings=256, rms_norm_eps=1e-5, attention_bias=True,
            eos_token_id=[1, 2], pad_token_id=0, initializer_range=0.15, tie_word_embeddings=False,
        )
        | shape
    )  # fmt: skip
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def test_yarn_as_the_released_readme_has_it_reaches_factor_times_the_original_positions(tmp_path, run):
    """``rope_scaling`` is added, and ``max_position_embeddings`` is left at the original positions."""
    scaling = dict(type="yarn", factor=4.0, original_max_position_embeddings=64)
    shape = dict(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=40, vocab_size=301
    )  # fmt: skip
    checkpoint = tmp_path / "checkpoint"
    save_transformers(
        transformers.Glm4ForCausalLM, checkpoint, 3, **shape, max_position_embeddings=64, rope_scaling=scaling
    )
    # The rope section as the README writes it, and the model that transformers makes of it.
    config = json.loads((checkpoint / "config.json").read_text())
    del config["rope_parameters"]
    config |= dict(rope_scaling=scaling, rope_theta=10000.0, partial_rotary_factor=0.5)
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = transformers.Glm4ForCausalLM.from_pretrained(checkpoint).eval()
    ids = np.random.default_rng(1).integers(0, 301, 256).tolist()
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    for target in ("ort", "native"):
        manifest = export(
            checkpoint, tmp_path / target, ExportOptions(target, "fp32", max_seq_len=256)
        ).manifest
        assert (manifest.model.max_positions, manifest.limits.max_seq_len) == (256, 256)
        with Session.open(tmp_path / target) as session:
            np.testing.assert_allclose(session.prefill(0, ids, logits="all"), wanted, atol=2e-4)
    assert "positions     256, by YaRN: factor 4 x 64 original positions\n" in run("inspect", checkpoint)[1]
    with pytest.raises(ExportError, match=r"max_seq_len is 257, but this model has 1 \.\.\. 256 positions"):
        export(checkpoint, tmp_path / "longer", ExportOptions(max_seq_len=257))


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_greedy_tokens_are_those_of_transformers(tmp_path, shape):
    model = save_transformers(transformers.Glm4ForCausalLM, tmp_path / "checkpoint", 3, **SHAPES[shape])
    vocab = model.config.vocab_size
    ids = np.random.default_rng(1).integers(0, vocab, 100).tolist()
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    for target in ("ort", "native"):
        bundle = tmp_path / target
        result = export(tmp_path / "checkpoint", bundle, ExportOptions(target, "fp32"))
        assert result.parity.max_abs_error < 2e-4
        assert result.parity.greedy_agreement == 32
        with Session.open(bundle) as session:
            session.prefill_chunk = 32
            scored = np.concatenate(list(session.score(ids, chunk=30)))
            greedy = [
                t.id for t in session.generate(ids[:20], SamplingParams(max_tokens=64, ignore_eos=True))
            ]
        assert np.abs(scored - wanted).max() < 2e-4
        with torch.inference_mode():  # the best token after each prefix of what was generated
            theirs = model(torch.tensor([ids[:20] + greedy])).logits[0, 19:-1].argmax(-1).tolist()
        assert greedy == theirs
        assert len(set(greedy)) > 3


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (transformers.Glm4ForSequenceClassification, 3),
        (transformers.Glm4ForTokenClassification, 5),
        (transformers.Glm4Model, None),
    ],
)
def test_the_other_tasks_are_those_of_transformers(tmp_path, kind, labels):
    shape = SHAPES["eight kv heads, no bias"] | ({"num_labels": labels} if labels else {})
    model = save_transformers(kind, tmp_path / "checkpoint", 4, **shape)
    ids = np.random.default_rng(2).integers(1, 517, 40).tolist()
    with torch.inference_mode():
        output = model(torch.tensor([ids]))
    for target in ("ort", "native"):
        export(tmp_path / "checkpoint", tmp_path / target, ExportOptions(target, "fp32"))
        with Session.open(tmp_path / target) as session:
            if labels is None:
                last = output.last_hidden_state[0, -1].numpy()
                np.testing.assert_allclose(session.encode(ids), last / np.linalg.norm(last), atol=1e-5)
                assert np.linalg.norm(session.encode(ids[:3])) == pytest.approx(1, abs=1e-6)
            else:
                np.testing.assert_allclose(session.classify(ids), output.logits[0].numpy(), atol=2e-4)


def test_an_encoder_from_a_causal_lm(tmp_path, tiny_checkpoint):
    """--task encoder leaves the head behind."""
    result = export(tiny_checkpoint, tmp_path / "encoder", ExportOptions("ort", "fp32", task="encoder"))
    assert result.manifest.pooling == "last-token, L2"
    model = transformers.AutoModel.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        last = model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1].numpy()
    with Session.open(tmp_path / "encoder") as session:
        np.testing.assert_allclose(session.encode([5, 6, 7]), last / np.linalg.norm(last), atol=1e-5)


# The cache key ------------------------------------------------------------------------------------


@pytest.fixture
def no_weight_is_read(monkeypatch):
    for name in ("read", "row_blocks"):
        monkeypatch.setattr(Checkpoint, name, lambda *_, **__: pytest.fail("a weight was read"))


def test_the_key_is_stable_and_moves_with_the_checkpoint(tmp_path, no_weight_is_read, tiny_checkpoint):
    key = cache_key(tiny_checkpoint, FAST)
    assert len(bytes.fromhex(key)) == 32
    assert cache_key(str(tiny_checkpoint), FAST) == key
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")  # keeps the times
    assert cache_key(tmp_path / "copy", FAST) == key


def test_the_key_is_of_the_bundle_and_not_of_how_it_is_checked(no_weight_is_read, tiny_checkpoint):
    key = cache_key(tiny_checkpoint, ExportOptions(parity=True))
    assert cache_key(tiny_checkpoint, ExportOptions(parity=False)) == key
    assert cache_key(tiny_checkpoint, ExportOptions(max_seq_len=256)) == key  # what it is anyway
    assert cache_key(tiny_checkpoint, ExportOptions(task="causal-lm")) == key


def test_the_key_changes_with_all_that_shapes_the_bundle(
    tmp_path, no_weight_is_read, tiny_checkpoint, monkeypatch
):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    keys = [cache_key(folder, FAST)]
    changes = (
        dict(target="native"), dict(precision="fp16"), dict(precision="bf16"), dict(max_seq_len=255),
        dict(max_batch_size=9), dict(task="encoder"),
    )  # fmt: skip
    keys += [cache_key(folder, ExportOptions(**{"precision": "fp32"} | change)) for change in changes]
    os.utime(folder / "model.safetensors", ns=(0, 12345))
    keys.append(cache_key(folder, FAST))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    keys.append(cache_key(folder, FAST))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    keys.append(cache_key(folder, FAST))
    monkeypatch.setattr("glm4_deploy.cache_key.tool_versions", lambda: {"torch": "99"})
    keys.append(cache_key(folder, FAST))
    assert len(set(keys)) == len(keys) == 11


def test_the_key_needs_no_torch(tiny_checkpoint):
    program = (
        "import sys; from glm4_deploy.cli import main\n"
        f"try: main(['export', {str(tiny_checkpoint)!r}, '--print-key', '--precision', 'fp32'])\n"
        "finally: print(*{'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == cache_key(tiny_checkpoint, ExportOptions(precision="fp32")) + "\n"
    assert set(done.stderr.split()) <= {"numpy"}
