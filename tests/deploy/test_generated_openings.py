"""Generated changes of bundles and checkpoints: each is opened or refused in one line, within limits of time and memory."""

import random
import sys
import time
from pathlib import Path

import pytest

from benchmarks.attacks_opening import FindingError, attempt, child_command, hunt, hunted, in_shards
from benchmarks.opening_inputs import CHANGES, digest, forged

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"


def found(what, sound, seed, count):
    return hunted([*child_command(sound, what), "--count", str(count)], seed, float("inf"))


def test_changed_bundles_of_fixed_seeds_do_no_harm(demo_bundle, demo_quantized):
    outcomes, findings, following = found("bundle", [demo_bundle, demo_quantized["cpu"]], 1, 40)
    assert findings == []
    assert (outcomes.total(), following) == (40, 41)
    assert any(said.endswith("opened") for said in outcomes)
    assert {said.partition(",")[0] for said in outcomes} == CHANGES["bundle"].keys()


def test_changed_checkpoints_of_fixed_seeds_do_no_harm(tmp_path):
    outcomes, findings, following = found("checkpoint", [in_shards(DEMO, tmp_path / "shards")], 1, 40)
    assert findings == []
    assert (outcomes.total(), following) == (40, 41)
    assert {said.partition(",")[0] for said in outcomes} == CHANGES["checkpoint"].keys()


def test_equal_seeds_make_equal_inputs(tmp_path, demo_bundle):
    made = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        done = [(forged(demo_bundle, folder, "bundle", seed), digest(folder)) for seed in range(10, 16)]
        made.append(done)
    assert made[0] == made[1]
    assert len({each for _, each in made[0]}) > 4


@pytest.mark.parametrize(
    ("child", "finding"),
    [
        ("import os; os._exit(3)", "seed 5: the process ended with 3: "),
        ("print('finding', '\"31 s\"')", "seed 5: 31 s"),
    ],
)
def test_a_child_that_dies_or_reports_is_a_finding(child, finding):
    command = [sys.executable, "-c", f"print('try 5', flush=True); {child}"]
    assert hunted(command, 5, time.time() + 60) == ({}, [finding], 6)


@pytest.mark.parametrize(
    ("error", "finding"),
    [(ValueError("no"), "ValueError 'no'"), (MemoryError(), "MemoryError"), (None, "s, ")],
)
def test_what_is_no_refusal_of_one_line_is_a_finding(tmp_path, monkeypatch, demo_bundle, error, finding):
    def opened(_folder):
        if error is not None:
            raise error
        return "opened"

    monkeypatch.setattr("benchmarks.attacks_opening.OPEN", {"bundle": opened})
    monkeypatch.setattr("benchmarks.attacks_opening.MOST_SECONDS", -1.0)
    with pytest.raises(FindingError, match=finding):
        attempt("bundle", [demo_bundle], tmp_path, random.randrange(100))


@pytest.mark.more
@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", list(CHANGES))
def test_ten_minutes_of_generated_changes_find_nothing(what):
    figures = hunt(DEMO, what, seed=int(time.time()), minutes=10)
    assert sum(figures["outcomes"].values()) > 100
    assert figures["findings"] == [], figures
