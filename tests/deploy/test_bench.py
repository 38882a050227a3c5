"""bench: figures of one bundle, and what it refuses before it loads anything."""

import json
import subprocess
import sys

import pytest
from checkpoints import tiny_config, write_checkpoint

from glm4_deploy.bench import BenchOptions, Runner, bench
from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.peak_memory import peak_memory
from glm4_runtime import Session
from glm4_runtime.bundle import WEIGHTS, read_manifest
from glm4_runtime.errors import RequestError

SMALL = {"prefill": (4, 9), "batch": (1, 3), "context": 5, "steps": 2}


def test_figures_are_tokens_per_second_of_every_length_and_batch(tiny_bundle):
    report = bench(tiny_bundle, BenchOptions(**SMALL, rounds=3, threads=1))
    assert list(report["prefill"]) == ["4", "9"]
    assert list(report["decode"]) == ["1", "3"]
    for figures in (*report["prefill"].values(), *report["decode"].values()):
        assert 0 < figures["min"] <= figures["median"] <= figures["max"]
    assert report["weight_bytes"] == (tiny_bundle / WEIGHTS).stat().st_size
    assert report["weight_bytes"] < report["peak_bytes"]
    assert report["peak_bytes"] == pytest.approx(peak_memory(), rel=0.02)  # the kernel counts in batches
    assert report["load_seconds"] > 0


def test_rates_count_the_tokens_of_all_sequences(tiny_bundles, monkeypatch):
    monkeypatch.setattr(Runner, "prefill", lambda *_: 0.5)
    monkeypatch.setattr(Runner, "decode", lambda *_: 0.25)
    report = bench(tiny_bundles["ort"], BenchOptions(**SMALL, rounds=1))
    assert {n: figures["median"] for n, figures in report["prefill"].items()} == {"4": 8, "9": 18}
    assert {n: figures["median"] for n, figures in report["decode"].items()} == {"1": 8, "3": 24}


def test_decoding_leaves_the_slots_as_they_were(tiny_bundle):
    with Session.open(tiny_bundle, max_batch_size=3) as session:
        runner = Runner(session)
        runner.fill(runner.tokens(5), 3)
        runner.decode(2, 4)
        assert [session.length(slot) for slot in range(3)] == [5, 5, 5]
        runner.empty()
        assert session.free_slots() == [0, 1, 2]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"prefill": (100_000,)}, "needs max-seq-len 100000.*export it again with --max-seq-len 100000"),
        ({"context": 100_000}, "needs max-seq-len 100002"),
        ({"batch": (1, 5)}, "needs max-batch-size 5, and the bundle has 4"),
    ],
)
def test_more_than_the_bundle_holds_is_refused(tiny_bundles, asked, words, monkeypatch):
    monkeypatch.setattr(Session, "open", lambda *_, **__: pytest.fail("refused too late"))
    with pytest.raises(RequestError, match=words):
        bench(tiny_bundles["ort"], BenchOptions(**(SMALL | asked)))


def test_only_a_causal_lm_can_be_asked(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "encoder", tiny_config())
    export(checkpoint, tmp_path / "bundle", ExportOptions(task="encoder", precision="fp32", parity=False))
    with pytest.raises(RequestError, match="for encoder; export the checkpoint with --task causal-lm"):
        bench(tmp_path / "bundle", BenchOptions(**SMALL))


def test_the_command_prints_json_or_rows(tiny_bundles, run):
    small = ("--prefill", "4", "--batch", "1,3", "--context", "5", "--steps", "2", "--rounds", "1")
    code, out, err = run("bench", tiny_bundles["ort"], *small, "--json")
    assert code == 0
    assert "measure" in err
    assert json.loads(out)["precision"] == read_manifest(tiny_bundles["ort"]).precision
    code, out, _ = run("bench", tiny_bundles["ort"], *small, "--threads", "1")
    assert code == 0
    assert "decode, batch 3" in out
    assert "1 threads" in out


def test_a_refusal_is_one_line(tiny_bundles, run):
    code, out, err = run("bench", tiny_bundles["ort"], "--batch", "99")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert run("bench", tiny_bundles["ort"], "--prefill", "0")[0] == 2


def test_neither_torch_nor_onnx_is_imported():
    code = "import sys, glm4_deploy.bench; print(sorted({'torch', 'onnx'} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
