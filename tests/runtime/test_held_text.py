"""What holds text back takes work in proportion to the text, however much is held."""

import sys

import pytest

from glm4_runtime.generate import Token
from glm4_runtime.reasoning import ThoughtSplitter
from glm4_runtime.scheduler import Generated
from glm4_runtime.server.reply import CallRules, Reply
from glm4_runtime.stop_strings import StopStrings
from glm4_runtime.text_pieces import TextPieces
from glm4_runtime.tool_calls import CallParser

BLANK, LINES = " " * 81, "\n" * 81


def parser(anywhere=True):
    return CallParser(["get_weather", "get_time"], anywhere)


def after(holder, text):
    holder.push(text)
    return holder


CASES = {
    "a blank line": (parser, BLANK),
    "empty lines": (parser, LINES),
    "empty lines, calls at the beginning only": (lambda: parser(anywhere=False), LINES),
    "blank behind content": (lambda: after(parser(), "Hello"), BLANK),
    "lines behind content": (lambda: after(parser(), "Hello"), LINES),
    "blank behind a name": (lambda: after(parser(), "get_time"), BLANK),
    "blank behind a head": (lambda: after(parser(), "get_time\n"), BLANK),
    "lines behind a head": (lambda: after(parser(), "get_time\n"), LINES),
    "blank behind a call": (lambda: after(parser(), "get_time\n{}"), BLANK),
    "blank in a second head": (lambda: after(parser(), '{"name":'), BLANK),
    "lines in a second head": (lambda: after(parser(), '{"name": "get_time",'), LINES),
    "blank behind a second call": (lambda: after(parser(), '{"name":"get_time","arguments":{}'), BLANK),
    "skipped members": (lambda: after(parser(), '{"name":"get_time","arguments":{},"x":"'), "y" * 81),
    "arguments": (lambda: after(parser(), 'get_time\n{"a": "'), "a" * 81),
    "a word in arguments": (lambda: after(parser(), "get_time\n{"), "True" * 20),
    "nested arguments": (lambda: after(parser(), "get_time\n"), '{"a":' * 16),
    "backslashes in arguments": (lambda: after(parser(), "get_time\n{'"), "\\'\"" * 27),
    "names in lines": (parser, "get_time\n" * 9),
    "heads in lines": (parser, '{"name": "get_time",\n' * 4),
    "blank before a thought": (ThoughtSplitter, BLANK),
    "blank in a thought": (lambda: after(ThoughtSplitter(True), "so"), BLANK),
    "blank at the beginning of a thought": (lambda: ThoughtSplitter(True), BLANK),
    "blank before an answer": (lambda: after(ThoughtSplitter(True), "so</think>"), BLANK),
    "tags cut short": (lambda: after(ThoughtSplitter(True), "so"), "</thin" * 13),
    "a long stop string": (lambda: StopStrings([" " * 10**6 + "z"]), BLANK),
    "many stop strings": (lambda: StopStrings([" " * 10**6 + end for end in "abcdefgh"]), BLANK),
    "a stop string that is broken off": (lambda: StopStrings([" " * 10**6 + "z"]), " " * 80 + "x"),
    "a stop string that repeats itself": (lambda: StopStrings(["ab" * 10**6 + "z"]), "abababa" * 11),
}


def work(make, text, count):
    """Calls that are made, and characters of the texts whose methods are called, for ``count`` pieces."""
    holder = make()
    total = 0

    def count_one(_frame, event, called):
        nonlocal total
        if event == "call":
            total += 1
        elif event == "c_call":
            owner = getattr(called, "__self__", None)
            total += 1 + (len(owner) if isinstance(owner, str) else 0)

    before = sys.getprofile()
    sys.setprofile(count_one)
    try:
        for _ in range(count):
            holder.push(text)
        holder.flush()
    finally:
        sys.setprofile(before)
    return total


@pytest.mark.parametrize("name", CASES)
def test_work_is_linear(name):
    make, text = CASES[name]
    once, twice = work(make, text, 60), work(make, text, 120)
    assert twice < 2.2 * once


@pytest.mark.parametrize("text", [BLANK, LINES, "a \n" * 27])
def test_twenty_thousand_blank_tokens_with_tools(text):
    """1.6 million characters; quadratic work would take hours."""
    held = Reply(inside_thought=False, call_rules=CallRules(["get_weather"]))
    shown = 0
    for _ in range(20_000):
        for delta in held.push(Generated(Token(5, text, 0.0))):
            shown += len(delta.get("content", ""))
    held.push(Generated(Token(5, "!", 0.0, "stop")))
    assert len(held.message["content"]) == 20_000 * len(text) + 1 - text.startswith("\n")
    assert shown <= len(held.message["content"])


def test_pieces_become_one_text():
    text = TextPieces()
    assert not text
    for piece in ("a", "", "b"):
        text.add(piece)
    assert text
    assert str(text) == str(text) == "ab"
    text.add("c")
    assert (text.take(), text.take()) == ("abc", "")
