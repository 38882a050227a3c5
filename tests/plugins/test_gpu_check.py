"""What of the GPU check runs without a GPU: its arguments, correctness by the interpreter, and the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import report

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


@pytest.mark.slow
def test_correctness_by_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    done = run("--interpret", "--out", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("ok ")]
    assert len(lines) == 16
    assert not (tmp_path / "results").exists()


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
