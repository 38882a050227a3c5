"""Thought and answer: split alike however the text is cut, and left out of history."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4_runtime.reasoning import ThoughtSplitter, begins_inside, without_thoughts


def split(pieces, inside):
    splitter = ThoughtSplitter(inside)
    parts = [splitter.push(piece) for piece in pieces] + [splitter.flush()]
    return "".join(thought for thought, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("\nHello", False, ("", "Hello")),
        ("\n\nHello\n", False, ("", "\nHello\n")),
        ("Hello", False, ("", "Hello")),
        ("", False, ("", "")),
        ("\n", False, ("", "")),
        ("<think>\nso\n</think>\n\nHello", False, ("so", "Hello")),
        ("\n<think>so</think>Hello", False, ("so", "Hello")),
        ("\nso\n\nit is\n</think>\n\nHello </think>", True, ("so\n\nit is", "Hello </think>")),
        ("<think>\nso</think>", True, ("so", "")),
        ("so </thin and", True, ("so </thin and", "")),
        ("so </thin", True, ("so </thin", "")),
        ("never ends\n", True, ("never ends", "")),
        ("</think>now", True, ("", "now")),
        ("<thin", False, ("", "<thin")),
        ("<thinking aloud>", False, ("", "<thinking aloud>")),
        ("  \n ", True, ("", "")),
    ],
)
def test_thought_and_answer(text, inside, expected):
    assert split([text], inside) == expected
    for cut in range(len(text) + 1):
        assert split([text[:cut], text[cut:]], inside) == expected
    assert split(list(text), inside) == expected


pieces = st.lists(
    st.one_of(
        st.sampled_from(["<think>", "</think>", "<", "/", "think>", "\n", " ", "a"]), st.text(max_size=3)
    )
)


@given(pieces, st.booleans())
def test_the_split_does_not_depend_on_the_pieces(parts, inside):
    assert split(parts, inside) == split(["".join(parts)], inside)


@given(pieces, st.booleans())
def test_nothing_but_tags_and_white_space_is_lost(parts, inside):
    text = "".join(parts)
    thought, answer = split(parts, inside)

    def bare(of):
        return "".join(of.replace("<think>", "", 1).replace("</think>", "", 1).split())

    assert answer in text
    assert thought in text
    if text.count("think>") < 2:
        assert bare(thought + answer) == bare(text)


def test_it_says_when_it_is_in_a_thought():
    splitter = ThoughtSplitter(inside=True)
    states = []
    for piece in ("so", " it", "</think>", "x"):
        splitter.push(piece)
        states.append(splitter.thinking)
    assert states == [True, True, False, False]
    assert not ThoughtSplitter().thinking


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ("<|assistant|>\n<think>", True),
        ("<|assistant|><think>\n", True),
        ("<|assistant|>", False),
        ("<think> x", False),
    ],
)
def test_the_template_may_open_the_thought(prompt, inside):
    assert begins_inside(prompt) is inside


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("<think>a</think>\nb", "b"),
        ("a</think>b</think>\n\nc", "c"),
        ("<think>cut off", ""),
        ("plain <think>", "plain <think>"),
        ("", ""),
    ],
)
def test_history_has_no_thoughts(content, kept):
    assert without_thoughts(content) == kept
