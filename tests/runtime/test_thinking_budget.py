"""The thinking of a reply ends after its budget, whatever the model wants."""

from pathlib import Path

import numpy as np
import pytest

from glm4_runtime.structured import AnswerFormat, GrammarCompiler, ReplyFormat
from glm4_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
VOCABULARY, EOS = 2048, 2038
FREE = ReplyFormat(turn=False, thinking_budget=4)
DIGIT = ReplyFormat(AnswerFormat("regex", "[0-9]"), thinking_budget=4)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, VOCABULARY, [EOS])


def allowed(mask):
    logits = np.zeros(VOCABULARY, np.float32)
    mask.apply(logits)
    return np.flatnonzero(logits == 0)


def wanted(mask, tokens, tokenizer):
    """The text that a model writes that wants these tokens, and takes what it must."""
    written = []
    for token in tokens:
        may = allowed(mask)
        written.append(token if token in may else int(may[0]))
        mask.advance(written[-1])
        if mask.finished:
            break
    return tokenizer.decode(written)


@pytest.mark.parametrize("reply", [FREE, DIGIT])
def test_a_long_thought_is_closed(compiler, tokenizer, reply):
    long = tokenizer.encode("one two three four five six seven eight nine", add_special_tokens=False)
    closing = tokenizer.encode("\n</think>", add_special_tokens=False)
    mask = compiler.compile(reply, thinking=True)
    text = wanted(mask, [*long[:4], *([EOS] * len(closing))], tokenizer)
    assert text == tokenizer.decode(long[:4]) + "\n</think>"
    if reply is FREE:
        assert len(allowed(mask)) > 1000
    else:
        assert tokenizer.encode("7", add_special_tokens=False)[0] not in allowed(mask)  # first the newline
        assert wanted(mask, tokenizer.encode("\n7", add_special_tokens=False), tokenizer).strip() == "7"
        assert mask.finished


@pytest.mark.parametrize("reply", [FREE, DIGIT])
def test_a_short_thought_is_left_alone(compiler, tokenizer, reply):
    short = tokenizer.encode("x</think>", add_special_tokens=False)
    for budget in (len(short), len(short) + 1):
        mask = compiler.compile(
            ReplyFormat(reply.answer, turn=reply.turn, thinking_budget=budget), thinking=True
        )
        assert wanted(mask, short, tokenizer) == "x</think>"
        assert len(allowed(mask)) > 1


def test_a_reply_that_goes_on_elsewhere_keeps_its_budget(compiler, tokenizer):
    long = tokenizer.encode("one two three four five six seven eight nine", add_special_tokens=False)
    closing = tokenizer.encode("\n</think>", add_special_tokens=False)
    mask = compiler.compile(FREE, thinking=True)
    mask.skip([*long[:4], closing[0]])
    assert list(allowed(mask)) == [closing[1]]
    twin = mask.copy()
    twin.advance(closing[1])
    assert list(allowed(twin)) == [closing[2]]
    assert list(allowed(mask)) == [closing[1]]


def test_without_thinking_there_is_no_budget(compiler):
    mask = compiler.compile(FREE, thinking=False)
    assert len(allowed(mask)) > 1000
    assert mask.grammar.reply.thinking_budget == 4
