"""Grammars over a turn: what they allow, when they end, and what they refuse."""

import json

import numpy as np
import pytest

from glm4_runtime.errors import RequestError
from glm4_runtime.structured import AnswerFormat, Function, GrammarCompiler, ReplyFormat
from glm4_runtime.tokenizer import Tokenizer

EOS = (2038, 2045, 2047)
VOCAB = 2050  # two more than the tokenizer has, as padded logits are
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTIONS = (Function("get_weather", CITY), Function("get_time", {"type": "object"}))
JSON = AnswerFormat(
    "json_schema", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
)


@pytest.fixture(scope="module")
def tokenizer():
    from pathlib import Path

    return Tokenizer.from_folder(Path(__file__).parents[2] / "demo" / "glm4-tiny")


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, VOCAB, EOS)


def allowed(mask):
    logits = np.zeros(VOCAB, np.float32)
    mask.apply(logits)
    return frozenset(np.flatnonzero(logits == 0).tolist())


@pytest.fixture
def follow(compiler, tokenizer):
    """How far a reply gets: "ends", "may end", "goes on", or the text that was refused."""

    def run(form, text, thinking=False):
        mask = compiler.compile(form, thinking)
        ids = tokenizer.encode(text, add_special_tokens=False)
        for at, token in enumerate(ids):
            if token not in allowed(mask):
                return tokenizer.decode(ids[at:], skip_special_tokens=False)
            mask.advance(token)
        return "ends" if mask.finished else "may end" if set(EOS) <= allowed(mask) else "goes on"

    return run


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (ReplyFormat(JSON), '\n{"a": 1}', "ends"),
        (ReplyFormat(JSON), '\n{"a": 1', "goes on"),
        (ReplyFormat(JSON), '\n{"b', 'b'),
        (ReplyFormat(JSON), '{"a": 1}', '{"a": 1}'),
        (ReplyFormat(JSON, turn=False), '{"a": 1}', "ends"),
        (ReplyFormat(JSON), '\n{\n    "a": 1\n}', "ends"),
        (ReplyFormat(AnswerFormat("regex", "a/b[0-9]+")), "\na/b1", "may end"),
        (ReplyFormat(AnswerFormat("regex", r"\s?x")), "\nx", "ends"),
        (ReplyFormat(AnswerFormat("grammar", 'start: "yes" | "no"')), "\nno", "ends"),
        (ReplyFormat(None, FUNCTIONS, required=True), 'get_weather\n{"city": "Oslo"}', "may end"),
        (ReplyFormat(None, FUNCTIONS, required=True), "get_time\n{}\nget_time\n{}", "may end"),
        (ReplyFormat(None, FUNCTIONS, required=True, max_calls=1), "get_time\n{}", "ends"),
        (ReplyFormat(None, FUNCTIONS, required=True), "\nHello", "\nHello"),
        (ReplyFormat(None, FUNCTIONS), "\nHello {", "may end"),
        (ReplyFormat(None, FUNCTIONS), "get_weather\n{}", "{}"),
        (ReplyFormat(JSON, FUNCTIONS), '\n{"a": 1}', "ends"),
        (ReplyFormat(JSON, FUNCTIONS), "get_time\n{}", "may end"),
        (ReplyFormat(None, FUNCTIONS, required=True, max_calls=1, enveloped=True),
         '{"name": "get_weather", "arguments": {"city": "Oslo"}}', "ends"),
        (ReplyFormat(None, FUNCTIONS, required=True, enveloped=True),
         '\n{"name": "get_time", "arguments": {}}\n{"name": "get_time", "arguments": {}}', "may end"),
        (ReplyFormat(None, FUNCTIONS, required=True, enveloped=True), "get_time\n{}", "get_time\n{}"),
    ],
)  # fmt: skip
def test_what_a_form_lets_through(follow, form, text, expected):
    found = follow(form, text)
    assert found == expected or (expected not in ("ends", "may end", "goes on") and text.endswith(found))


def test_a_thought_comes_first_and_may_hold_anything(follow):
    form = ReplyFormat(JSON)
    assert follow(form, 'hm {"b": <think> 1\n</thin\n</think>\n\n{"a": 1}', thinking=True) == "ends"
    assert follow(form, "hm", thinking=True) == "goes on"
    calls = ReplyFormat(None, FUNCTIONS, required=True)
    assert follow(calls, "hm</think>get_time\n{}", thinking=True) == "may end"
    assert follow(calls, "hm</think>\nget_time\n{}", thinking=True) == "may end"
    assert follow(calls, "hm</think>\nHello", thinking=True).endswith("Hello")


def test_white_space_in_json_has_an_end(follow):
    assert follow(ReplyFormat(JSON), '\n{"a":' + " " * 9) != "goes on"


def test_no_control_or_padding_token_is_text(compiler):
    mask = compiler.compile(ReplyFormat(None, FUNCTIONS), thinking=False)
    mask.advance(198)  # the newline before an answer, which is free
    assert allowed(mask) & set(range(2038, VOCAB)) == set(EOS)


def test_copies_go_their_own_way(compiler, tokenizer):
    first = compiler.compile(ReplyFormat(AnswerFormat("regex", "ab|cd"), turn=False), thinking=False)
    second = first.copy()
    (a,), (c,) = (tokenizer.encode(text, add_special_tokens=False) for text in "ac")
    first.advance(a)
    assert {a, c} <= allowed(second)
    second.advance(c)
    assert allowed(first) != allowed(second)


def test_an_end_token_ends_it(compiler):
    mask = compiler.compile(ReplyFormat(None, FUNCTIONS), thinking=False)
    mask.advance(198)
    mask.advance(EOS[1])
    assert mask.finished
    mask.advance(5)  # of a scheduler that had one more under way
    assert mask.finished


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (AnswerFormat("regex", "["), "unclosed character class"),
        (AnswerFormat("regex", "\ud800"), "Unicode"),
        (AnswerFormat("grammar", "start: nothing"), "nothing"),
        (AnswerFormat("grammar", ""), "cannot be enforced"),
        (AnswerFormat("json_schema", {"type": "elephant"}), "elephant"),
        (AnswerFormat("json_schema", {"not": {}}), "not"),
        (AnswerFormat("json_schema", {"const": "\ud800"}), "cannot be enforced"),
        (AnswerFormat("json_schema", {"$ref": "https://example.com/x"}), "example.com"),
    ],
)
def test_what_cannot_be_enforced_is_refused_in_one_line(compiler, answer, words):
    with pytest.raises(RequestError, match=words) as caught:
        compiler.compile(ReplyFormat(answer), thinking=False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_reference_without_its_hash_means_the_schema_itself(follow):
    schema = {
        "type": "object",
        "properties": {
            "a": {"$ref": "/$defs/x"},
            "b": {"type": "array", "items": {"$ref": "/definitions/y"}},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
        "$defs": {"x": {"const": 7}},
        "definitions": {"y": {"const": {"$ref": "/$defs/x"}}},  # a value, which stays
    }
    form = ReplyFormat(AnswerFormat("json_schema", schema), turn=False)
    assert follow(form, '{"a": 7, "b": [{"$ref": "/$defs/x"}]}') == "ends"
    assert follow(form, '{"a": 8') == "8"


def test_a_deep_schema_is_no_crash(compiler):
    schema = {}
    for _ in range(5000):
        schema = {"properties": {"x": schema}}
    with pytest.raises(RequestError, match="cannot be enforced"):
        compiler.compile(ReplyFormat(AnswerFormat("json_schema", schema)), thinking=False)


def test_token_bytes(compiler, tokenizer):
    text = "Zürich, 東京\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(compiler.token_bytes(token) for token in ids) == text.encode()
    assert compiler.token_bytes(2046) == b"<|assistant|>"


def test_user_schemas_cannot_loosen_our_options(follow):
    schema = json.loads(json.dumps(JSON.definition)) | {"x-guidance": {"whitespace_flexible": True}}
    assert follow(ReplyFormat(AnswerFormat("json_schema", schema)), '\n{"a":' + " " * 9) != "goes on"
