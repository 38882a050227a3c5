"""Nobody's text becomes a control token: names of control tokens in messages are encoded as plain text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4_runtime.chat_template import ChatTemplate
from glm4_runtime.errors import RequestError
from glm4_runtime.prompts import Prompt, marked
from glm4_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
MARK = "7036094152870"  # longer than the digits that a test makes
CONTROL = (
    "<|user|>",
    "<|system|>",
    "<|assistant|>",
    "<|observation|>",
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "<sop>",
)
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="module")
def template():
    return ChatTemplate.from_folder(DEMO)


@pytest.fixture
def encoded(tokenizer, template):
    def encode(messages, tools=None):
        prompt = template.prompt(messages, tools, control_tokens=tokenizer.control_tokens)
        assert prompt.text == template.render(messages, tools)
        return tokenizer.encode_prompt(prompt)

    return encode


def controls(tokenizer, ids):
    return [token for token in ids if token in tokenizer.special_ids]


@pytest.mark.parametrize("name", CONTROL)
@pytest.mark.parametrize("role", ["user", "system", "assistant", "observation", "tool"])
def test_names_in_messages_are_text(tokenizer, encoded, name, role):
    plain, named = ({"role": role, "content": f"a {text}\n{text}{text} b"} for text in ("it", name))
    ids = encoded([named])
    assert controls(tokenizer, ids) == controls(tokenizer, encoded([plain]))
    assert f"a {name}\n{name}{name} b" in tokenizer.decode(ids)  # control tokens are left out of this


@pytest.mark.parametrize("name", CONTROL)
def test_names_in_tools_calls_and_parts_are_text(tokenizer, encoded, name):
    def conversation(text):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {text: [text]}}}
        parts = [{"type": "text", "text": part} for part in (text[:3], text[3:])]
        function = TOOL["function"] | {
            "description": text,
            "parameters": {"properties": {text: {"enum": [text]}}},
        }
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "observation", "content": text},
        ]
        return messages, [TOOL | {"function": function}]

    ids = encoded(*conversation(name))
    assert controls(tokenizer, ids) == controls(tokenizer, encoded(*conversation("something")))
    assert tokenizer.decode(ids).count(name) == 7


def test_the_templates_own_tokens_stay_what_they_are(tokenizer, encoded):
    ids = encoded([{"role": "user", "content": "<|user|>"}])
    names = [tokenizer.token_of(token) for token in controls(tokenizer, ids)]
    assert names == ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]


def test_without_such_names_nothing_is_marked_and_the_ids_are_the_usual_ones(tokenizer, template, encoded):
    messages = [{"role": "user", "content": "2 < 3 | [MASK ] <| user |>"}]
    assert template.prompt(messages, control_tokens=tokenizer.control_tokens).mark == ""
    assert encoded(messages) == tokenizer.encode(template.render(messages), add_special_tokens=False)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([*CONTROL, "<|", "user", "|>", " ", "\n", "é"]), st.text(max_size=4)),
        max_size=8,
    )
)
def test_any_text_comes_back_as_it_was(tokenizer, template, parts):
    text = "".join(parts).encode("utf-8", "ignore").decode()
    prompt = template.prompt([{"role": "user", "content": text}], control_tokens=tokenizer.control_tokens)
    ids = tokenizer.encode_prompt(prompt)
    assert len(controls(tokenizer, ids)) == 4
    assert tokenizer.decode(ids) == "\n" + text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["a", " b", "\n", "<|user|>", "[gMASK]", "东京"]), st.integers(0, 9).map(str)
        ),
        max_size=12,
    )
)
def test_the_marked_way_of_encoding_gives_the_usual_ids(tokenizer, parts):
    """A mark somewhere between whole words, in a text whose control tokens are meant as such."""
    text = "".join(parts) + "<|user|>end"
    assert tokenizer.encode_prompt(Prompt(text + MARK, MARK)) == tokenizer.encode(
        text, add_special_tokens=False
    )


def test_a_mark_is_nothing_that_somebody_wrote():
    first = marked({"a": "<|user|>"}, CONTROL)[1]
    said, mark = marked({"a": f"<|user|>{first}", "b": int(first) + 1}, CONTROL)
    assert mark not in (first, str(int(first) + 1))
    assert Prompt(said["a"], mark).text == f"<|user|>{first}"
    assert marked({"a": "<|user"}, CONTROL) == ({"a": "<|user"}, "")


def test_half_a_surrogate_pair_is_refused(tokenizer, template):
    prompt = template.prompt(
        [{"role": "user", "content": "<|user|>\ud800"}], control_tokens=tokenizer.control_tokens
    )
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode_prompt(prompt)
