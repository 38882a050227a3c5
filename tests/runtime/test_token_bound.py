"""The least number of tokens that a text has, told from its bytes."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4_runtime.token_bound import TokenBound
from glm4_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
TOKENIZER = Tokenizer.from_folder(DEMO)
DEFINITION = json.loads((DEMO / "tokenizer.json").read_text("utf-8"))
WORDS = st.sampled_from(
    ["righteousness", " inheritance", "the", "<|endoftext|>", "[gMASK]<sop>", "春", "\n\n", "  "]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS | st.text(max_size=5), max_size=30).map("".join))
def test_a_text_never_has_fewer_tokens(text):
    assert TOKENIZER.least_tokens(text) <= len(TOKENIZER.encode(text, add_special_tokens=False))


def test_the_longest_tokens_alone_reach_the_bound():
    """The bound cannot be tighter: of the longest token, each is one."""
    longest = max(DEFINITION["model"]["vocab"], key=len).replace("Ġ", " ")
    found = TOKENIZER.least_tokens(longest * 1000)
    assert len(TOKENIZER.encode(longest * 1000, add_special_tokens=False)) == 1000
    assert 900 <= found <= 1000


def test_letters_that_stand_in_short_tokens_only_count_for_more():
    assert TOKENIZER.least_tokens("春" * 1000) > 2000
    assert TOKENIZER.least_tokens("e" * 1000) < 100


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Split", "behavior": "Removed"}, {"type": "ByteLevel"}],
            }
        },
        {"added_tokens": [{"content": "<x>", "lstrip": True, "rstrip": False}]},
        {"model": {"type": "Unigram", "vocab": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}}},
    ],
)
def test_a_tokenizer_that_may_change_or_drop_bytes_has_no_bound(changes):
    assert TokenBound(json.dumps(DEFINITION | changes)).least("x" * 10_000) == 0
    assert TokenBound(json.dumps(DEFINITION)).least("x" * 10_000) > 0


def test_half_a_surrogate_pair_is_left_to_encoding():
    assert TOKENIZER.least_tokens("\ud800" * 100) == 0


def test_long_texts_are_encoded_as_short_ones_are():
    text = "In the beginning 春 <|user|> [gMASK]\n" * 400
    assert len(text) > 8192
    alone = [TOKENIZER._backend.encode(part, add_special_tokens=False).ids for part in (text,)]
    assert TOKENIZER.encode(text, add_special_tokens=False) == alone[0]
    assert TOKENIZER.encode(text)[2:] == alone[0]
    assert TOKENIZER.encode("[gMASK]" + text)[1:] == alone[0]
