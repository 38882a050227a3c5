"""The scheduler's decisions, without a session: shares of a step, prefixes, drafts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4_runtime.scheduler.drafts import WIDTHS, Speculation, look_up
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


def test_look_up_finds_the_latest_of_the_longest_matches():
    draft = look_up(ids(1, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3), 2)
    assert (draft.ids.tolist(), draft.matched) == ([4, 9], 3)
    draft = look_up(ids(7, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3), 2)
    assert (draft.ids.tolist(), draft.matched) == ([5, 8], 2)


def test_look_up_goes_on_with_a_repetition():
    assert look_up(ids(5, 1, 2, 3, 1, 2, 3), 7).ids.tolist() == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("tokens", [[1], [1, 1], [1, 2, 3], [3, 1, 2, 3]])
def test_look_up_wants_two_tokens_that_match(tokens):
    assert look_up(ids(*tokens), 4) is None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_look_up_is_what_a_plain_search_finds(tokens):
    def match(end):
        length = 0
        while length < min(6, end + 1) and tokens[end - length] == tokens[-1 - length]:
            length += 1
        return length

    best = max(((match(end), end) for end in range(len(tokens) - 1)), default=(0, 0))
    draft = look_up(ids(*tokens), 1)
    assert (draft is None) == (best[0] < 2)
    if draft is not None:
        assert (draft.matched, draft.ids.tolist()) == (best[0], [tokens[best[1] + 1]])


def spend(speculation, seconds_of, right, steps=60, matched=9):
    """Run steps where ``right(width)`` of a draft are right; the widths that were chosen."""
    widths = []
    for _ in range(steps):
        width = speculation.width(matched, 100)
        widths.append(width)
        if width:
            count = right(width)
            speculation.verified(width, seconds_of(width))
            speculation.compared(matched, count, int(count < width))
        else:
            speculation.decoded(1.0)
            speculation.compared(matched, min(1, right(1)), 1 - min(1, right(1)))
    return widths


def test_speculation_begins_after_a_plain_step_and_widens_where_all_is_right():
    widths = spend(Speculation(), lambda _: 1.1, lambda width: width)
    assert widths[0] == 0
    assert widths[-10:] == [WIDTHS[-1]] * 10


def test_speculation_stops_where_nothing_is_right():
    widths = spend(Speculation(), lambda _: 1.5, lambda _: 0, steps=300)
    assert sum(width > 0 for width in widths[20:]) <= 12  # and tries again now and then
    assert sum(1.5 if width else 1.0 for width in widths) <= 1.1 * len(widths)


def test_speculation_stops_where_width_costs_what_it_gives():
    widths = spend(Speculation(), lambda width: 1.0 + width, lambda width: width // 2, steps=300)
    assert sum(width > 0 for width in widths[20:]) <= 40


def test_speculation_starts_again_when_the_text_repeats_itself():
    speculation = Speculation()
    assert spend(speculation, lambda _: 1.5, lambda _: 0)[-1] == 0
    assert spend(speculation, lambda _: 1.5, lambda width: width)[-1] == WIDTHS[-1]


def test_a_draft_is_never_longer_than_what_may_follow():
    speculation = Speculation()
    speculation.decoded(1.0)
    assert [speculation.width(9, most) for most in (0, 1, 3)] == [0, 1, 3]
