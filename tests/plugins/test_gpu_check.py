"""What of the GPU check runs without a GPU: its arguments, correctness by the interpreter, and the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_config

from benchmarks.gpu_check import engines, report
from benchmarks.make_checkpoint import SIZES
from glm4_exporters.architecture import expected_tensors
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime import Session

ROOT = Path(__file__).parents[2]
FOLDERS = os.pathsep.join(str(ROOT / folder) for folder in (".", "exporters", "runtime", "plugins"))


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": FOLDERS},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    done = run("--out", str(tmp_path / "results"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no" in done.stderr
    assert "--interpret" in done.stderr
    assert not (tmp_path / "results").exists()


def test_times_are_not_interpreted():
    done = run("--interpret", "--only", "decode")
    assert done.returncode == 2
    assert "correctness only" in done.stderr


def test_correctness_by_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    done = run("--interpret", "--out", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("ok ")]
    assert len(lines) == 16
    assert not (tmp_path / "results").exists()


# Whole models, on the CPU: what exports, compares and times them takes any session ------------------------------


def test_layers_follow_the_scarcest_memory():
    size, plenty = SIZES["9b"], 10**13
    assert engines.layers_that_fit(size, plenty, plenty, plenty) == size.layers
    for scarce in ((24 * 10**9, plenty, plenty), (plenty, 30 * 10**9, plenty), (plenty, plenty, 30 * 10**9)):
        layers = engines.layers_that_fit(size, *scarce)
        assert 0 < layers < size.layers
        assert engines.layers_that_fit(size, *(n // 2 for n in scarce)) < layers
    assert engines.layers_that_fit(size, 10**9, plenty, plenty) == 0


@pytest.fixture
def session(tiny_bundles):
    with Session.open(tiny_bundles["ort"], max_batch_size=1) as opened:
        yield opened


def test_parity_against_the_eager_model(tiny_checkpoint, session):
    tokens = engines.parity_tokens(300)[:40]
    expected = engines.eager_logits(tiny_checkpoint, tokens, "cpu")
    assert expected.shape == (engines.PARITY_STEPS + 1, session.manifest.model.vocab_size)
    found = engines.parity(session, tokens, expected)
    assert found["mean_kl"] < 1e-8
    assert found["top1"] == 1
    other = engines.parity(session, [*tokens[:-12], 5, *tokens[-11:]], expected)
    assert other["mean_kl"] > engines.LARGEST_KL["int8"]
    assert session.free_slots() == [0]


def test_times_are_of_what_is_asked_for(session, tiny_bundles, monkeypatch):
    monkeypatch.setattr(engines, "PREFILLS", (16, 10**6))
    weights = engines.weight_bytes_of(tiny_bundles["ort"])
    record = engines.measured(session, weights, bandwidth=1e9)
    room = session.max_seq_len
    assert list(record["prefill_seconds"]) == ["16", str(room)]
    assert list(record["decode_seconds"]) == ["1"]
    assert 0 < record["decode_seconds"]["1"] < record["prefill_seconds"][str(room)]
    read = record["of_copy_bandwidth"]["1"] * record["decode_seconds"]["1"] * 1e9
    assert read == pytest.approx(engines.bytes_read(session, weights, 1, room // 2))
    assert session.free_slots() == [0]


def test_a_checkpoint_is_written_as_exports_read_it(tmp_path):
    engines.write_checkpoint(tmp_path / "made", tiny_config(), "cpu")
    with Checkpoint.load(tmp_path / "made") as source:
        assert set(source.tensors) == set(expected_tensors(source.config, "causal-lm"))
        norm = source.read("model.norm.weight").float()
        assert abs(float(norm.mean()) - 1) < 0.1
    logits = engines.eager_logits(tmp_path / "made", list(range(4, 40)), "cpu")
    assert 0.1 < float(logits.std()) < 10


def test_what_the_host_lacks_is_named(monkeypatch):
    missing, present = (
        engines.Candidate("a", "fp16", "no_such_module"),
        engines.Candidate("b", "fp16", "json"),
    )
    assert engines.why_absent(missing) == "no_such_module is not installed"
    assert engines.why_absent(present) is None
    provider = engines.Candidate("ort", "fp16", "onnxruntime", "NoSuchProvider")
    assert engines.why_absent(provider) == "the installed onnxruntime has no NoSuchProvider"


RESULTS = dict(
    host=dict(device="a GPU", torch="2.13"),
    ceilings=dict(copy_bytes_per_second=3.0e12, matmul_per_second=7.9e14),
    correctness=[dict(ok=True, heads=32), dict(ok=False, heads=48)],
    decode=[
        dict(
            batch=8, past=8191, new=1, ours={"a": 0.030, "b": 0.025}, torch={"flash": 0.050, "math": 0.4},
            refused={"cudnn": "No available kernel"}, to_best_torch=0.5, of_copy_bandwidth=0.89, of_matmul_rate=0.01,
        ),
        dict(batch=1, past=0, new=1, ours={}, torch={}, refused={"a": "out of memory"}),
    ],
    engines=[
        dict(
            bundle="tensorrt-rtx fp16", layers=17, parity=dict(mean_kl=1.5e-6, top1=1.0), ok=False,
            prefill_seconds={"512": 0.0123}, decode_seconds={"1": 0.004, "8": 0.005}, of_copy_bandwidth={"1": 0.81},
        )
    ],
    absent=["tensorrt is not installed"],
    refused=["prefill: no"],
)  # fmt: skip


def test_the_report_says_what_is_best_what_is_wrong_and_what_was_refused(tmp_path):
    data, page = report.write(RESULTS, tmp_path)
    assert json.loads(data.read_text()) == RESULTS
    text = page.read_text()
    assert "1 of 2 right" in text
    assert 'WRONG: {"ok": false, "heads": 48}' in text
    assert "| 8 | 8191 | 1 | 0.0250 | b | 0.0500 | flash | 0.50 | 0.89 | 0.01 |" in text
    assert "| 1 | 0 | 1 | refused |  | refused |  |  |  |  |" in text
    assert "- prefill: no" in text
    assert "- 8 x 8191+1, cudnn: No available kernel" in text
    assert (
        "| tensorrt-rtx fp16 | 17 | 1.50e-06 | 1.00 | NO | 512: 12.30 | 1: 4.00, 8: 5.00 | 1: 0.81 |" in text
    )
    assert "- tensorrt is not installed, so it was not tried" in text
