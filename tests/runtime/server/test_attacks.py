"""Probes and small requests are answered in time while a server is attacked."""

import pytest

from benchmarks.attacks_serving import ATTACKS, attacked, findings


def test_what_is_slow_or_fails_is_a_finding():
    good = {"worst": 0.5, "failed": 0}
    figures = {
        "silent": {"health": good, "completion": {"worst": 0.51, "failed": 0}},
        "unread": {"health": {"worst": 0.1, "failed": 2}, "completion": good},
    }
    assert findings(figures) == [
        "silent: completion took 0.51 s at worst, 0 failed",
        "unread: health took 0.1 s at worst, 2 failed",
    ]


@pytest.mark.more
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_holds_up_nobody_else(demo_bundle, name):
    assert findings({name: attacked(demo_bundle, name, 8)}) == []
