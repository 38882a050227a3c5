"""The number of replicas follows the load at once upwards, and after a delay downwards. No clock runs here."""

import pytest

from glm4_runtime.cluster.scaling import ReplicaCount, Scaler


@pytest.mark.parametrize(("text", "least", "most"), [("4", 4, 4), ("1:8", 1, 8), ("2:2", 2, 2)])
def test_a_count_is_a_number_or_a_range(text, least, most):
    assert ReplicaCount.parse(text) == ReplicaCount(least, most)


@pytest.mark.parametrize("text", ["0", "3:2", "0:2", "-1", "1:", ":2", "1:2:3", "two", ""])
def test_no_other_text_is_a_count(text):
    with pytest.raises(ValueError, match=r"is no range|invalid literal"):
        ReplicaCount.parse(text)


@pytest.mark.parametrize(("requests", "wanted"), [(0, 1), (3, 1), (4, 2), (7, 2), (8, 3), (31, 8), (1000, 8)])
def test_one_slot_stays_free_as_long_as_the_most_allows(requests, wanted):
    assert Scaler(ReplicaCount(1, 8)).wanted(0.0, requests, slots=4) == wanted


def test_replicas_end_only_after_the_load_was_low_for_the_whole_delay():
    scaler = Scaler(ReplicaCount(1, 8))
    found = [scaler.wanted(float(second), 20 if second == 0 else 0, 4) for second in range(310)]
    assert found[:301] == [6] * 301
    assert found[301:] == [1] * 9


def test_a_short_load_begins_the_delay_again_for_its_own_need():
    scaler = Scaler(ReplicaCount(1, 8))
    loads = {0: 28, 200: 12}  # 8 replicas, then 4
    found = {second: scaler.wanted(float(second), loads.get(second, 0), 4) for second in range(0, 600, 50)}
    assert [found[second] for second in (0, 300, 350, 500, 550)] == [8, 8, 4, 4, 1]


def test_the_memory_of_loads_is_bounded():
    scaler = Scaler(ReplicaCount(1, 64))
    for second in range(5000):
        scaler.wanted(float(second), second % 97, 1)
    assert len(scaler._needed) <= 64
