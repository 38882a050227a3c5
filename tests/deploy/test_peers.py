"""The comparison with the peers: its protocol, its arithmetic, and that a contender's failure ends nothing."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.peers import __main__ as peers
from benchmarks.peers.contenders import OURS, Contender, ContenderError, Process
from benchmarks.peers.report import RATES, summary, write_report
from benchmarks.peers.worker import prompt


def ours(folder):
    return Contender("ours:tiny", OURS, Path(sys.executable), folder)


class SmallCeilings:
    """Neither a GiB to read nor a large product, which a test has no use for."""

    def __init__(self, threads):
        pass

    def bandwidth(self):
        return 40.0

    def integer_gemm(self):
        return 1000.0


def turn(rate):
    costs = {"peak_gb": 1.0, "load_s": 2.0, "bandwidth": 40.0, "cores_of_others": 0.5}
    return dict.fromkeys(RATES, rate) | costs


def result(*rounds):
    about = {"versions": {"package": "1.2"}, "note": "", "convert_s": None}
    return {
        "date": "2026-01-01",
        "machine": "a machine",
        "threads": 2,
        "checkpoint": "tiny",
        "context": 512,
        "steps": 32,
        "command": "python -m benchmarks.peers",
        "ours": "ours:tiny",
        "contenders": {"ours:tiny": about, "peer:int8": about},
        "rounds": [{"integer_gemm": 1000.0, "contenders": one} for one in rounds],
        "failures": ["peer:int8, round 2: it fell"],
    }


def test_a_contender_answers_in_seconds(tiny_bundles, tmp_path):
    with Process(ours(tiny_bundles["ort"]), 1, 64, 3, tmp_path / "log") as process:
        assert process.loaded() > 0
        assert process.ask(do="prefill", tokens=9, vocabulary=50) > 0
        assert process.ask(do="fill", tokens=5, batch=3, vocabulary=50) > 0
        assert process.ask(do="decode", steps=2) > 0
        assert process.ask(do="spread", batch=2) > 0
        assert process.ask(do="decode", steps=2) > 0
        assert 0 <= process.cores_of_others() < os.cpu_count() + 1
        assert process.peak_bytes() > (tiny_bundles["ort"] / "model.onnx.data").stat().st_size


def test_a_process_that_ends_is_a_failure_with_its_log(tmp_path):
    with (
        Process(ours(tmp_path), 1, 64, 1, tmp_path / "log") as process,
        pytest.raises(ContenderError, match=r"ended with 1; see .*log"),
    ):
        process.loaded()
    assert "is not a bundle" in (tmp_path / "log").read_text()


def test_prompts_are_the_same_for_all_and_within_the_vocabulary():
    assert prompt(100, 50) == prompt(100, 50)
    assert set(prompt(1000, 50)) == set(range(50))


def test_ratios_are_taken_within_the_rounds_that_have_both():
    rounds = (
        {"ours:tiny": turn(10.0), "peer:int8": turn(5.0)},
        {"ours:tiny": turn(90.0)},
        {"ours:tiny": turn(30.0), "peer:int8": turn(10.0)},
    )
    one = summary(result(*rounds))["peer:int8"]["decode 4"]
    assert one == {"median": 7.5, "min": 5.0, "max": 10.0, "ours_over_it": 2.5}


def test_the_report_has_a_table_a_plot_and_what_failed(tmp_path):
    write_report(result({"ours:tiny": turn(10.0), "peer:int8": turn(4.0)}), tmp_path / "peers")
    page = (tmp_path / "peers.md").read_text()
    assert "| ours:tiny | 10.0 (10.0–10.0) |" in page
    assert "| peer:int8 | 2.50 | 2.50 | 2.50 | 2.50 | 2.50 | 1.00 | 1.00 |" in page
    assert "- failed: peer:int8, round 2: it fell" in page
    assert (tmp_path / "peers.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize("name", ["tensorflow:int8", "llama.cpp", "llama.cpp:"])
def test_an_unknown_peer_is_answered_with_the_known(name):
    with pytest.raises(ContenderError, match=r"known are llama\.cpp:FORMAT, openvino:FORMAT"):
        Contender.from_name(name, Path(), Path())


def test_a_cap_limits_every_contender():
    llama = Contender.from_name("llama.cpp:q8_0", Path("environments"), Path(), "avx2")
    assert llama.python == Path("environments/llama-cpp-avx2/bin/python")
    assert Contender.from_name("openvino:int8", Path(), Path(), "avx2").variables == {
        "ONEDNN_MAX_CPU_ISA": "AVX2"
    }
    with pytest.raises(ContenderError, match="ort-genai:int8 cannot be limited to avx2"):
        Contender.from_name("ort-genai:int8", Path(), Path(), "avx2")


def test_a_process_gets_the_variables_of_its_cap(tmp_path):
    code = "import os, json; print(json.dumps({'seconds': int(os.environ['GLM4_CPU_KERNELS'] == 'sse9')}))"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    python.chmod(0o755)
    limited = replace(ours(tmp_path), python=python, variables={"GLM4_CPU_KERNELS": "sse9"})
    with Process(limited, 1, 64, 1, tmp_path / "log") as process:
        assert process.loaded() == 1


@pytest.fixture
def quick(monkeypatch):
    """Short columns, without ceilings."""
    monkeypatch.setattr(peers, "Ceilings", SmallCeilings)
    monkeypatch.setattr(peers, "PROMPTS", (8, 16))
    monkeypatch.setattr(peers, "BATCHES", (1, 2))
    monkeypatch.setattr(peers, "CONTEXT", 8)
    monkeypatch.setattr(peers, "STEPS", 2)
    monkeypatch.setattr("benchmarks.peers.report.RATES", ("prefill 8", "prefill 16", "decode 1", "decode 2"))


def test_rounds_are_resumed_under_the_same_conditions(tiny_checkpoint, tiny_bundles, tmp_path, quick):
    def run(*options):
        asked = [tiny_checkpoint, tiny_bundles["ort"], "--out", tmp_path / "out", *options]
        return CliRunner().invoke(peers.main, [str(argument) for argument in asked])

    assert run("--rounds", 1).exit_code == 0
    [first] = json.loads((tmp_path / "out.json").read_text())["rounds"]
    assert run("--rounds", 2, "--resume").exit_code == 0
    rounds = json.loads((tmp_path / "out.json").read_text())["rounds"]
    assert rounds[0] == first
    assert len(rounds) == 2
    refused = run("--rounds", 3, "--resume", "--threads", 1)
    assert refused.exit_code == 1
    assert "has another threads; leave out --resume" in refused.output


def test_one_that_is_not_installed_leaves_the_others_be(tiny_checkpoint, tiny_bundles, tmp_path, quick):
    places = ["--environments", tmp_path / "none", "--models", tmp_path / "models", "--out", tmp_path / "out"]
    asked = [tiny_checkpoint, tiny_bundles["ort"], "--peers", "llama.cpp:q8_0", "--rounds", 2, *places]
    said = CliRunner().invoke(peers.main, [str(argument) for argument in asked])
    assert said.exit_code == 0, said.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert [list(one["contenders"]) for one in found["rounds"]] == [["ours:ort"], ["ours:ort"]]
    assert "run benchmarks/peers/setup.sh" in found["failures"][0]


def test_long_contexts_have_columns_of_their_own(tiny_checkpoint, tiny_bundles, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "Ceilings", SmallCeilings)
    for name, value in (("LONG_BATCHES", (1, 2)), ("LONG_STEPS", 2), ("UNTIMED", 4), ("MARGIN", 3)):
        monkeypatch.setattr(peers, name, value)
    asked = [
        tiny_checkpoint,
        tiny_bundles["ort"],
        "--rounds",
        1,
        "--contexts",
        "8,20",
        "--out",
        tmp_path / "out",
    ]
    said = CliRunner().invoke(peers.main, [str(argument) for argument in asked])
    assert said.exit_code == 0, said.output
    columns = [f"{what} {n}" for n in (8, 20) for what in ("prefill", "decode 1 at", "decode 2 at")]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["columns"] == columns
    turn = found["rounds"][0]["contenders"]["ours:ort"]
    assert all(turn[column] > 0 for column in columns)
    assert f"| {' | '.join(columns)} |" in (tmp_path / "out.md").read_text()
