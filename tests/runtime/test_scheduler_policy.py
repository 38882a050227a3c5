"""The scheduler's decisions, without a session: shares of a step, prefixes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4_runtime.scheduler.policy import prefill_budget, retry_after, shares
from glm4_runtime.scheduler.prefix_cache import WORTH_SHARING, Placement, place, shared, should_wait


def ids(*numbers):
    return np.array(numbers, np.int64)


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, length)


@pytest.mark.parametrize(
    ("rests", "budget", "expected"),
    [
        ([], 512, []),
        ([100], 512, [100]),
        ([1000], 512, [512]),
        ([600, 600, 600], 512, [512, 0, 0]),  # alike: the first is done soonest
        ([30000, 200], 512, [312, 200]),  # a short one does not wait for a long one
        ([200, 30000, 10], 300, [200, 90, 10]),
        ([5, 5], 1, [1, 0]),
    ],
)
def test_shares_of_a_step(rests, budget, expected):
    assert shares(rests, budget) == expected


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.integers(1, 2000))
def test_shares_spend_the_budget_and_no_more(rests, budget):
    taken = shares(rests, budget)
    assert all(0 <= count <= rest for count, rest in zip(taken, rests, strict=True))
    assert sum(taken) == min(budget, sum(rests))
    fair = budget // len(rests)
    assert all(count == rest for count, rest in zip(taken, rests, strict=True) if rest <= fair)
    unfinished = [count for count, rest in zip(taken, rests, strict=True) if rest > fair]
    assert not unfinished or unfinished[0] >= min(fair, rests[0])


def test_no_prompt_starves_under_a_stream_of_short_ones():
    """Three slots; two of them get a new short prompt in every step, the third has a long one."""
    rest, steps = 10_000, 0
    while rest:
        rest -= shares([rest, 100, 100], 512)[0]
        steps += 1
    assert steps <= -(-10_000 // (512 // 3))


def test_decoding_comes_first_and_prompts_always_get_something():
    assert prefill_budget(512, 8) == 504
    assert prefill_budget(8, 16) == 1


def test_retry_after_is_the_time_until_a_slot_is_free():
    assert retry_after(8, 20.0) == 3
    assert retry_after(8, 0.0) == 1


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_shared_is_the_longest_common_prefix(one, other):
    length = shared(ids(*one), ids(*other))
    assert one[:length] == other[:length]
    assert one[length : length + 1] != other[length : length + 1] or length == min(len(one), len(other))


def test_a_prompt_like_none_before_takes_a_free_slot():
    assert place(text(50), {}, {0: text(50, seed=1)}, [1, 2]) == Placement(1)


def test_the_next_turn_of_a_chat_goes_on_in_its_slot():
    history = text(60)
    prompt = np.concatenate((history, text(20, seed=1)))
    assert place(prompt, {3: history}, {}, [0, 1]) == Placement(3, 3, 60)


def test_the_last_token_of_a_prompt_is_never_reused():
    prompt = text(40)
    assert place(prompt, {0: prompt}, {}, [1]) == Placement(0, 0, 39)


def test_a_system_prompt_stays_where_it_is():
    """Only 20 of 100 kept positions are shared: they are copied, and the other chat is still there."""
    chat = text(100)
    prompt = np.concatenate((chat[:20], text(30, seed=1)))
    assert place(prompt, {0: chat}, {}, [1]) == Placement(1, 0, 20)


def test_a_live_slot_can_be_copied_from_but_not_taken():
    prompt = text(60)
    assert place(prompt, {}, {2: prompt[:50]}, [5]) == Placement(5, 2, 50)


def test_the_least_recently_used_is_evicted_and_the_source_last():
    first, second = text(100, 1), text(100, 2)
    prompt = np.concatenate((first[:30], text(9)))
    assert place(text(50, 9), {0: first, 1: second}, {}, []) == Placement(0)
    assert place(prompt, {0: first, 1: second}, {}, []) == Placement(1, 0, 30)
    # the only slot there is to take is the source itself: it is cut, not copied
    assert place(prompt, {0: first}, {}, []) == Placement(0, 0, 30)


def test_short_beginnings_are_not_shared():
    assert place(text(WORTH_SHARING), {}, {0: text(100)}, [1]) == Placement(
        1
    )  # its last token does not count


def test_it_waits_for_a_prompt_that_is_being_taken():
    prompt = text(100)
    assert should_wait(prompt, [], [prompt])
    assert should_wait(prompt, [prompt[:64]], [prompt])
    assert not should_wait(prompt, [prompt[:99]], [prompt])  # all there is to have
    assert not should_wait(prompt, [], [text(100, seed=1)])
    assert not should_wait(prompt, [], [])
