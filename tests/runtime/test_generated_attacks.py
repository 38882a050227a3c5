"""Generated formats and templates: each is enforced, rendered or refused, within limits of time and memory."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks.attack_inputs import KINDS
from benchmarks.attacks_grammar import child_command, hunt, hunted

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"


def test_inputs_of_fixed_seeds_do_no_harm():
    outcomes, findings, following = hunted(child_command(DEMO, list(KINDS), "--count", "32"), 1, float("inf"))
    assert findings == []
    assert (outcomes.total(), following) == (32, 33)
    assert outcomes.keys() >= {"lark compiled", "regex compiled", "schema compiled", "template refused"}


@pytest.mark.parametrize(
    ("child", "finding"),
    [
        ("import os; os._exit(3)", "lark 5: the process ended with 3"),
        ("print('finding 31 s')", "lark 5: 31 s"),
    ],
)
def test_a_child_that_dies_or_reports_is_a_finding(child, finding):
    command = [sys.executable, "-c", f"print('try lark 5', flush=True); {child}"]
    assert hunted(command, 5, time.time() + 60) == ({}, [finding], 6)


@pytest.mark.more
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kinds", [["schema", "lark", "regex"], ["template"]], ids=["grammar", "template"])
def test_ten_minutes_of_generated_inputs_find_nothing(kinds):
    figures = hunt(DEMO, kinds, seed=int(time.time()), minutes=10)
    assert figures["inputs"] > 100
    assert figures["findings"] == [], figures
