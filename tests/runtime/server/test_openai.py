"""The official client over a real server and the demo bundle."""

import json
import math
import re
import time

import openai
import pytest

from glm4_runtime.server.completions import ChoiceText, legacy_logprobs

MODEL = "glm4-tiny"
WHO = [{"role": "user", "content": "Who are you?"}]
GREEDY = {"model": MODEL, "messages": WHO, "temperature": 0}
ABOUT = "I am glm4-tiny, a very small model for demonstrations. I have read a few old books."
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name, description, parameters=CITY, **more):
    function = {"name": name, "description": description, "parameters": parameters} | more
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", "The weather of a city today.")
TIME = tool("get_time", "The local time of a city.")
ASK = [{"role": "user", "content": "What is the weather in Oslo?"}]


def streamed(stream):
    """What the chunks of a stream come to, for one choice."""
    content = reasoning = ""
    calls, reasons, usage = {}, [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                known = calls.setdefault(
                    call.index, {"id": call.id, "name": call.function.name, "arguments": ""}
                )
                known["arguments"] += call.function.arguments or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    return content, reasoning, list(calls.values()), reasons, usage


def test_an_answer(client):
    answer = client.chat.completions.create(**GREEDY)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (ABOUT, "stop")
    assert choice.message.tool_calls is None
    assert choice.logprobs is None
    assert answer.model == MODEL
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == 9
    assert answer.usage.completion_tokens == 34
    assert answer.usage.total_tokens == 43
    assert 0 <= answer.usage.prompt_tokens_details.cached_tokens < 9
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_stream_says_the_same(client):
    chunks = list(client.chat.completions.create(**GREEDY, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert len(chunks) > 20
    assert streamed(chunks)[0] == ABOUT
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stream_can_end_with_its_usage(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *others, last = client.chat.completions.create(**GREEDY, **options)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (9, 34)
    assert all(chunk.usage is None and chunk.choices for chunk in others)


@pytest.mark.parametrize("asked", [{}, {"include_usage": True}])
def test_a_stream_has_nothing_that_openai_does_not_send_unless_it_is_asked_for(strict_client, asked):
    for chunk in strict_client.chat.completions.create(**GREEDY, stream=True, stream_options=asked):
        assert not chunk.model_extra
        assert not any(choice.model_extra or choice.delta.model_extra for choice in chunk.choices)


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_stream_can_end_with_its_timings(strict_client, with_usage):
    options = {"include_timings": True, "include_usage": with_usage}
    began = time.perf_counter()
    *others, last = strict_client.chat.completions.create(**GREEDY, stream=True, stream_options=options)
    spent = time.perf_counter() - began
    assert last.choices == []
    assert (last.usage is not None) == with_usage
    assert not any(chunk.model_extra for chunk in others)
    assert last.model_extra.keys() == {"timings"}
    first, rate = last.timings["first_token_seconds"], last.timings["tokens_per_second"]
    assert 0 < first < spent
    assert rate > 33 / spent  # of 34 tokens, those after the first


def test_timings_of_a_single_token_have_no_rate(client):
    options = {"stream": True, "stream_options": {"include_timings": True}, "max_tokens": 1}
    *_, last = client.completions.create(model=MODEL, prompt="x", **options)
    assert last.timings["first_token_seconds"] > 0
    assert last.timings["tokens_per_second"] is None


def test_max_tokens_cuts_an_answer(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(**GREEDY, **{name: 5})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 5
        assert ABOUT.startswith(answer.choices[0].message.content)


def test_stop_strings_end_an_answer(client):
    answer = client.chat.completions.create(**GREEDY, stop=[" model", "books"])
    assert answer.choices[0].message.content == ABOUT.partition(" model")[0]
    assert answer.choices[0].finish_reason == "stop"
    one = client.chat.completions.create(**GREEDY, stop="tiny", stream=True)
    assert streamed(one)[0] == ABOUT.partition("tiny")[0]


def test_several_answers_with_seeds(client):
    asked = {"model": MODEL, "messages": WHO, "temperature": 3.0, "max_tokens": 12, "seed": 7}
    first = client.chat.completions.create(**asked, n=3)
    again = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    assert first.usage.prompt_tokens == 9
    assert first.usage.completion_tokens <= 36
    (single,) = client.chat.completions.create(**asked | {"seed": 8}).choices
    assert single.message.content == texts[1]


def test_streams_of_several_answers_are_told_apart(client):
    asked = {"model": MODEL, "messages": WHO, "temperature": 2.0, "max_tokens": 8, "seed": 1, "n": 2}
    whole = client.chat.completions.create(**asked)
    texts, ended = ["", ""], []
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ended += [choice.index] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(ended) == [0, 1]


def test_sampling_options_reach_the_sampler(client):
    tokens = client.chat.completions.create(**GREEDY, logprobs=True, max_tokens=2).choices[0].logprobs.content
    assert tokens[1].token == "I"
    (i,) = _tokenized(client, "I")
    banned = client.chat.completions.create(**GREEDY, logit_bias={str(i): -100}, max_tokens=8)
    assert not banned.choices[0].message.content.startswith("I")
    hot = {"model": MODEL, "messages": WHO, "temperature": 50.0, "seed": 3, "max_tokens": 20}
    assert client.chat.completions.create(**hot, top_p=1e-9).choices[0].message.content[:20] == ABOUT[:20]
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        answer = client.chat.completions.create(**hot, extra_body=extra)
        assert answer.choices[0].message.content[:20] == ABOUT[:20]
    long = client.chat.completions.create(**GREEDY, max_tokens=60, extra_body={"ignore_eos": True})
    assert long.usage.completion_tokens == 60


def _tokenized(client, text):
    body = {"prompt": text, "add_special_tokens": False}
    return client.post("/../tokenize", body=body, cast_to=dict[str, object])["tokens"]


def test_logprobs(client):
    answer = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 33  # all but the end of the sequence
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == "\n" + ABOUT
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-6)
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1 + 1e-6
    plain = client.chat.completions.create(**GREEDY, logprobs=True).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in plain] == [[]] * 33


def test_logprobs_of_a_stream(client):
    whole = (
        client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    )
    entries = []
    for chunk in client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=2, stream=True):
        logprobs = chunk.choices[0].logprobs
        entries += [] if logprobs is None else logprobs.content
    assert [entry.token for entry in entries] == [entry.token for entry in whole]


def test_the_model_calls_a_tool_by_itself(client):
    asked = {"model": MODEL, "messages": ASK, "tools": [WEATHER], "temperature": 0}
    answer = client.chat.completions.create(**asked)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert call.function.arguments == '{"city": "Oslo"}'
    content, _, calls, reasons, _ = streamed(client.chat.completions.create(**asked, stream=True))
    assert (content, reasons) == ("", ["tool_calls"])
    assert [(call["name"], call["arguments"]) for call in calls] == [("get_weather", '{"city": "Oslo"}')]
    messages = [
        *ASK,
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear", "celsius": 18}'},
    ]
    told = client.chat.completions.create(**asked | {"messages": messages})
    assert "18 degrees" in told.choices[0].message.content
    assert told.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_always_parses(client, choice, stream):
    bounded = CITY | {
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "additionalProperties": False,
    }
    tools = [tool("get_weather", "The weather.", bounded), tool("get_time", "The time.", bounded)]
    for seed in range(4):
        asked = {"model": MODEL, "messages": WHO, "tools": tools, "tool_choice": choice, "seed": seed}
        # so hot that nothing but the grammar keeps it in form
        asked |= {"temperature": 1.5, "max_tokens": 1000, "parallel_tool_calls": seed % 2 == 0}
        if stream:
            content, _, calls, reasons, _ = streamed(client.chat.completions.create(**asked, stream=True))
        else:
            (given,) = client.chat.completions.create(**asked).choices
            content, reasons = given.message.content or "", [given.finish_reason]
            calls = [{"id": c.id, **c.function.model_dump()} for c in given.message.tool_calls]
        assert (content, reasons) == ("", ["tool_calls"])
        assert 1 <= len(calls) <= (16 if seed % 2 == 0 else 1)
        for call in calls:
            assert re.fullmatch(r"call_[0-9a-f]{24}", call["id"])
            assert call["name"] in (("get_weather", "get_time") if choice == "required" else ("get_time",))
            assert isinstance(json.loads(call["arguments"])["city"], str)


def test_the_model_is_not_shown_what_is_meant_for_the_server(client):
    counts = [
        client.post("/../tokenize", body={"messages": WHO, "tools": [given]}, cast_to=dict[str, object])[
            "count"
        ]
        for given in (WEATHER, tool("get_weather", "The weather of a city today.", strict=True))
    ]
    assert counts[0] == counts[1]


def test_tool_choice_none_hides_the_tools(client):
    asked = {"model": MODEL, "messages": ASK, "tools": [WEATHER], "temperature": 0, "max_tokens": 60}
    answer = client.chat.completions.create(**asked, tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage.prompt_tokens < client.chat.completions.create(**asked).usage.prompt_tokens / 2


def test_strict_functions_are_held_to_their_schema_also_by_auto(client):
    only = {"type": "object", "properties": {"city": {"enum": ["Nowhere"]}}, "required": ["city"]}
    strict = tool("get_weather", "The weather of a city today.", only, strict=True)
    asked = {"model": MODEL, "messages": ASK, "tools": [strict], "temperature": 0}
    (choice,) = client.chat.completions.create(**asked).choices
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Nowhere"}
    (choice,) = client.chat.completions.create(**asked | {"messages": WHO}).choices
    assert choice.message.content == ABOUT


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    for seed in range(4):
        asked = {"model": MODEL, "messages": WHO, "response_format": form, "seed": seed, "temperature": 1.5}
        given = client.chat.completions.create(**asked, max_tokens=200, stream=stream)
        text = streamed(given)[0] if stream else given.choices[0].message.content
        person = json.loads(text)
        assert set(person) == {"name", "age"}
        assert 0 <= person["age"] <= 99
        assert len(person["name"]) <= 12


def test_other_forms(client):
    def form(**given):
        asked = GREEDY | {"max_tokens": 100, "extra_body": {"response_format": given}}
        return client.chat.completions.create(**asked).choices[0].message.content

    assert re.fullmatch(r"[a-c]{3}-[0-9]{2}", form(type="regex", regex=r"[a-c]{3}-[0-9]{2}"))
    assert form(type="grammar", grammar='start: ("yes" | "no") " sir"') in ("yes sir", "no sir")
    assert isinstance(json.loads(form(type="json_object")), dict)
    assert form(type="text").startswith(ABOUT)


def test_pydantic_models_parse(client):
    from typing import Literal

    from pydantic import BaseModel

    class Answer(BaseModel):
        sure: bool
        kind: Literal["raven", "whale"]

    parsed = client.chat.completions.parse(**GREEDY, max_tokens=60, response_format=Answer)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_an_answer_or_a_call_can_both_have_a_form(client):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    asked = {"model": MODEL, "tools": [WEATHER], "temperature": 0, "response_format": form, "max_tokens": 100}
    called = client.chat.completions.create(**asked, messages=ASK).choices[0]
    assert called.message.tool_calls[0].function.arguments == '{"city": "Oslo"}'
    told = client.chat.completions.create(**asked, messages=WHO).choices[0]
    assert set(json.loads(told.message.content)) == {"name", "age"}


def test_completions(client):
    asked = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    both = client.completions.create(**asked, prompt=["In the beginning", "Call me"], n=2, echo=True)
    texts = [choice.text for choice in both.choices]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert texts[0].startswith("In the beginning")
    assert texts[2].startswith("Call me")
    one = client.completions.create(**asked, prompt="Call me")
    assert "Call me" + one.choices[0].text == texts[2]
    assert one.choices[0].finish_reason == "length"
    assert one.usage.completion_tokens == 8
    pieces = [
        chunk.choices[0].text for chunk in client.completions.create(**asked, prompt="Call me", stream=True)
    ]
    assert "".join(pieces) == one.choices[0].text
    ids = _with_prefix(client, "Call me")
    assert client.completions.create(**asked, prompt=ids).choices[0].text == one.choices[0].text
    assert client.completions.create(**asked, prompt=[ids, ids]).choices[1].text == one.choices[0].text


def _with_prefix(client, text):
    return client.post("/../tokenize", body={"prompt": text}, cast_to=dict[str, object])["tokens"]


def test_completions_with_logprobs(client):
    asked = {"model": MODEL, "temperature": 0, "max_tokens": 6, "prompt": "Call me", "logprobs": 2}
    (choice,) = client.completions.create(**asked).choices
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert [
        choice.text[at:][: len(token)]
        for at, token in zip(logprobs.text_offset, logprobs.tokens, strict=True)
    ] == (logprobs.tokens)
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 2
        assert top[token] == pytest.approx(value, abs=1e-6)
    offsets = []
    for chunk in client.completions.create(**asked, stream=True):
        offsets += chunk.choices[0].logprobs.text_offset
    assert offsets == logprobs.text_offset


def test_pieces_of_a_character_have_names_and_offsets():
    """An emoji over two tokens is one character of the text, and its pieces are told apart by their bytes."""
    choice = ChoiceText("")
    pieces = [b"a", b"\xf0\x9f", b"\x99\x82", b"b"]
    for piece in pieces:
        top = [
            {"token": data.decode("utf-8", "replace"), "logprob": -1.0, "bytes": list(data)}
            for data in (piece, b"\xf0", b"\xf1")
        ]
        choice.note(top[0] | {"top_logprobs": top})
    listed = legacy_logprobs(choice.logprobs)
    assert listed["tokens"] == ["a", "bytes:\\xf0\\x9f", "bytes:\\x99\\x82", "b"]
    assert listed["text_offset"] == [0, 1, 1, 2]
    assert [len(top) for top in listed["top_logprobs"]] == [3, 3, 3, 3]


def test_completions_with_a_form(client):
    form = {"response_format": {"type": "regex", "regex": "[0-9]{4}"}}
    answer = client.completions.create(model=MODEL, prompt="The year", max_tokens=20, extra_body=form)
    assert re.fullmatch("[0-9]{4}", answer.choices[0].text)


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "glm4-deploy"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_tokenize_and_back(client):
    body = {"messages": WHO, "model": MODEL}
    found = client.post("/../tokenize", body=body, cast_to=dict[str, object])
    assert found["count"] == len(found["tokens"]) == 9
    back = client.post("/../detokenize", body={"tokens": found["tokens"]}, cast_to=dict[str, object])
    assert back["prompt"] == "[gMASK]<sop><|user|>\nWho are you?<|assistant|>"
