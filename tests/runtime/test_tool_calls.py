"""GLM-4-0414's calls: found alike however the text is cut, arguments byte for byte."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4_runtime.tool_calls import CallArguments, CallEnd, CallParser, CallStart, Content

NAMES = ("get_weather", "get_time", "get")


def parse(pieces, names=NAMES, anywhere=True):
    """The content, and each call as [name, arguments, whether it ended]. A piece None is a turn's beginning."""
    parser = CallParser(names, anywhere)
    events = []
    for piece in pieces:
        events += parser.boundary() if piece is None else parser.push(piece)
    content, calls = "", []
    for event in events + parser.flush():
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallStart):
            calls.append([event.name, "", False])
        elif isinstance(event, CallArguments):
            calls[-1][1] += event.text
        else:
            assert isinstance(event, CallEnd)
            calls[-1][2] = True
    return content, calls


ODD = '{ "city" :\t"Zürich \\"{x}\\" \\\\",\n\n "n": {"a": [{}, "}"]} }'
CASES = [
    ("", "", []),
    ("Hello", "Hello", []),
    ("Hello\n\n", "Hello\n\n", []),
    ('get_weather\n{"city": "Oslo"}', "", [["get_weather", '{"city": "Oslo"}', True]]),
    (f"get_weather\n{ODD}", "", [["get_weather", ODD, True]]),
    ("\nget_weather \r\n  {}\n", "", [["get_weather", "{}", True]]),
    ("get_time\n{}\nget_weather\n{}", "", [["get_time", "{}", True], ["get_weather", "{}", True]]),
    ("get_time\n{}get\n{}", "", [["get_time", "{}", True], ["get", "{}", True]]),
    ("I look.\n\nget_time\n{}", "I look.", [["get_time", "{}", True]]),
    ("get_time\n{} Done.", " Done.", [["get_time", "{}", True]]),
    ('get_time\n{"a": "cut', "", [["get_time", '{"a": "cut', False]]),
    ("get_time", "get_time", []),
    ("get_time\n", "get_time\n", []),
    ("get_time\nis a function", "get_time\nis a function", []),
    ("get_time\nget_time\n{}", "get_time", [["get_time", "{}", True]]),
    ("get_times\n{}", "get_times\n{}", []),
    ("get_time: x\n{}", "get_time: x\n{}", []),
    ("call get_time\n{}", "call get_time\n{}", []),
    ("unknown\n{}", "unknown\n{}", []),
    ('x\n```\nget_time\n{"a": 1}\n```\nget\n{}', 'x\n```\nget_time\n{"a": 1}\n```', [["get", "{}", True]]),
    ("a\n\n  b", "a\n\n  b", []),
    # the second form
    ('{"name": "get", "arguments": {"a": "}"}}', "", [["get", '{"a": "}"}', True]]),
    ('\n{ "name"\n:"get" ,\n"arguments" : {} }\n', "", [["get", "{}", True]]),
    ('{"name":"get","arguments":{}}{"name":"get_time","arguments":{}}', "",
     [["get", "{}", True], ["get_time", "{}", True]]),
    ('{"name":"get","arguments":{}}\nget_time\n{}', "", [["get", "{}", True], ["get_time", "{}", True]]),
    ('So:\n{"name":"get","arguments":{"n":{}}}\nDone.', "So:\nDone.", [["get", '{"n":{}}', True]]),
    ('{"name":"get","arguments":{}, "id": {"x": "}"}}', "", [["get", "{}", True]]),
    ('{"name":"get","arguments":{} and more', " and more", [["get", "{}", True]]),
    ('{"name":"get","arguments":{"a": "cut', "", [["get", '{"a": "cut', False]]),
    ("{'name': 'get', 'arguments': {'a': None}}", "", [["get", '{"a": null}', True]]),
    ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
    ('{"name": "gets", "arguments": {}}', '{"name": "gets", "arguments": {}}', []),
    ('{"name": "get"}', '{"name": "get"}', []),
    ('{"name": "get", "arguments": [1]}', '{"name": "get", "arguments": [1]}', []),
    ('{"city": "Oslo"}\n', '{"city": "Oslo"}\n', []),
    ("{\nget\n{}", "{", [["get", "{}", True]]),
    ('{"name":\nget\n{}', '{"name":', [["get", "{}", True]]),
    ('x {"name":"get","arguments":{}}', 'x {"name":"get","arguments":{}}', []),
    ('```\n{"name":"get","arguments":{}}\n```', '```\n{"name":"get","arguments":{}}\n```', []),
    # Python's form of the arguments
    ("get\n{'q': 'x}'}", "", [["get", '{"q": "x}"}', True]]),
    ("get\n{'a': True, 'b': None, 'c': [False, 1e5], 'd': \"it's {\"}", "",
     [["get", '{"a": true, "b": null, "c": [false, 1e5], "d": "it\'s {"}', True]]),
    (r"""get
{'a': 'say "hi" \\ \'x\' \n \x41 \u00e9 \d', 'Trues': 1}""", "",
     [["get", r'{"a": "say \"hi\" \\ ' + r"'x' \n \u0041 \u00e9 \\d" + '", "Trues": 1}', True]]),
    ("get\n{'a': 'two\nlines\t.'}", "", [["get", '{"a": "two\\u000alines\\u0009."}', True]]),
    ("get\n{'a': Tru", "", [["get", '{"a": Tru', False]]),
    ('get\n{"a": Truest, "b": true}', "", [["get", '{"a": Truest, "b": true}', True]]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), CASES)
def test_calls_and_content(text, content, calls):
    assert parse([text]) == (content, calls)
    for cut in range(len(text) + 1):
        assert parse([text[:cut], text[cut:]]) == (content, calls)
    assert parse(list(text)) == (content, calls)


def test_a_turn_of_the_model_may_begin_with_a_call():
    assert parse(["Let me see.", None, "get\n{}", None, "get_time\n{}"]) == (
        "Let me see.",
        [["get", "{}", True], ["get_time", "{}", True]],
    )
    assert parse(["Let me see.get\n{}"]) == ("Let me see.get\n{}", [])
    assert parse(["get", None, "get\n{}"]) == ("get", [["get", "{}", True]])
    assert parse(['get\n{"a', None, '": 1}']) == ("", [["get", '{"a": 1}', True]])


def test_calls_only_where_the_reply_begins():
    assert parse(["\nget\n{}\nget\n{}"], anywhere=False) == ("", [["get", "{}", True]] * 2)
    assert parse(["So:\nget\n{}"], anywhere=False) == ("So:\nget\n{}", [])
    assert parse(["get\nx\nget\n{}"], anywhere=False) == ("get\nx\nget\n{}", [])


def test_text_comes_as_soon_as_it_is_certain():
    parser = CallParser(NAMES)
    assert parser.push("He") == [Content("He")]
    assert parser.push("llo\nget") == [Content("llo")]
    assert parser.push("_weather\n") == []
    assert parser.push('{"a') == [CallStart("get_weather"), CallArguments('{"a')]
    assert parser.push('": 1}') == [CallArguments('": 1}'), CallEnd()]
    assert parser.flush() == []


fragments = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "get",
                "_weather",
                "get_time",
                "\n",
                " ",
                "{",
                "}",
                '"',
                "\\",
                "```",
                "a",
                "get\n{",
                "}\n",
                "'",
                "True",
                "None",
                ",",
                ":",
                '{"name":"get"',
                '{"name"',
                '"arguments":',
                "\\x41",
            ]
        ),
        st.text(max_size=3),
    ),
    max_size=12,
)


@given(fragments, st.booleans())
def test_the_result_does_not_depend_on_the_pieces(parts, anywhere):
    assert parse(parts, anywhere=anywhere) == parse(["".join(parts)], anywhere=anywhere)


@given(fragments)
def test_without_functions_nothing_is_a_call(parts):
    assert parse(parts, names=()) == ("".join(parts), [])


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=8,
)


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(), values)), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([None, 2]),
    st.data(),
)
def test_any_arguments_come_through_byte_for_byte(calls, escaped, indent, data):
    written = [
        (name, json.dumps(arguments, ensure_ascii=escaped, indent=indent)) for name, arguments in calls
    ]
    text = "\n".join(f"{name}\n{arguments}" for name, arguments in written)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(pieces) == ("", [[name, arguments, True] for name, arguments in written])


python_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
              st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]))),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text("ab'\"{}\\\n"), inner)),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text("abc'\"{}\\"), python_values))
def test_arguments_in_pythons_form_come_as_json(arguments):
    (name, found, ended), *_ = parse([f"get\n{arguments!r}"])[1]
    assert (name, ended) == ("get", True)
    assert json.loads(found) == arguments


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(), values)), min_size=1, max_size=3),
    st.sampled_from([None, 2]),
    st.data(),
)
def test_calls_of_the_second_form_come_through_byte_for_byte(calls, indent, data):
    text = "\n".join(json.dumps({"name": n, "arguments": a}, indent=indent) for n, a in calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, found = parse(pieces)
    assert content == ""
    assert [(name, json.loads(arguments), ended) for name, arguments, ended in found] == [
        (name, arguments, True) for name, arguments in calls
    ]
