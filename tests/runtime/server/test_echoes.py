"""What clients send back: answers with all that their libraries added to them."""

import json

import httpx
import openai
import pytest
from pydantic import BaseModel

from glm4_runtime.server.messages import Message

MODEL = "glm4-tiny"
ASK = {"role": "user", "content": "What is the weather in Oslo?"}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "clear", "celsius": 18}'}
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 60}


class get_weather(BaseModel):  # noqa: N801  the model knows the function by this name
    """The weather of a city today."""

    city: str


class Person(BaseModel):
    sure: bool


WEATHER = openai.pydantic_function_tool(get_weather)


@pytest.fixture(scope="module")
def prompt_of(server):
    """A function that renders messages as the model sees them."""

    def render(*messages):
        found = httpx.post(f"{server.url}/tokenize", json={"messages": messages}, timeout=30)
        assert found.status_code == 200, found.text
        back = httpx.post(f"{server.url}/detokenize", json={"tokens": found.json()["tokens"]}, timeout=30)
        return back.json()["prompt"]

    return render


def test_a_parsed_call_and_its_result_go_on(client):
    called = client.chat.completions.parse(**GREEDY, messages=[ASK], tools=[WEATHER]).choices[0].message
    (call,) = called.tool_calls
    assert call.function.parsed_arguments == get_weather(city="Oslo")
    told = client.chat.completions.parse(
        **GREEDY, messages=[ASK, called, RESULT | {"tool_call_id": call.id}], tools=[WEATHER]
    )
    assert "18 degrees" in told.choices[0].message.content


def test_a_parsed_answer_goes_back(client):
    who = {"role": "user", "content": "Who are you?"}
    answer = client.chat.completions.parse(**GREEDY, messages=[who], response_format=Person)
    message = answer.choices[0].message
    assert isinstance(message.parsed, Person)
    again = client.chat.completions.parse(**GREEDY, messages=[who, message, who], response_format=Person)
    assert again.choices[0].message.parsed is not None


def test_the_final_message_of_a_stream_goes_back(client):
    with client.chat.completions.stream(**GREEDY, messages=[ASK], tools=[WEATHER]) as stream:
        called = stream.get_final_completion().choices[0].message
    (call,) = called.tool_calls
    result = RESULT | {"tool_call_id": call.id}
    with client.chat.completions.stream(**GREEDY, messages=[ASK, called, result], tools=[WEATHER]) as stream:
        assert "18 degrees" in stream.get_final_completion().choices[0].message.content


def test_a_message_as_it_came_goes_back(client):
    """Also as a dict of all its fields, those that are null included."""
    called = client.chat.completions.create(**GREEDY, messages=[ASK], tools=[WEATHER]).choices[0].message
    for dumped in (called.model_dump(), called.to_dict(), json.loads(called.model_dump_json())):
        result = RESULT | {"tool_call_id": called.tool_calls[0].id}
        told = client.chat.completions.create(**GREEDY, messages=[ASK, dumped, result], tools=[WEATHER])
        assert "18 degrees" in told.choices[0].message.content


PLAIN = {"role": "assistant", "content": "Hello!"}
ADDED_TO_ANSWERS = {
    "openai": {"refusal": None, "audio": None, "annotations": [], "function_call": None, "tool_calls": None},
    "openai, parsed": {"parsed": {"sure": True}},
    "citations": {"annotations": [{"type": "url_citation", "url_citation": {"url": "x", "start_index": 0}}]},
    "litellm": {
        "provider_specific_fields": {"refusal": None},
        "images": [],
        "thinking_blocks": None,
        "reasoning_content": "hm",
    },
    "openrouter, vllm": {"reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
    "langchain": {
        "id": "run-1",
        "type": "ai",
        "name": None,
        "additional_kwargs": {},
        "response_metadata": {"finish_reason": "stop"},
        "usage_metadata": {"total_tokens": 1},
        "invalid_tool_calls": [],
    },
    "anthropic through a proxy": {"cache_control": {"type": "ephemeral"}},
    "azure": {"content_filter_results": {}, "context": {"citations": []}, "end_turn": True},
    "deepseek, mistral": {"prefix": False},
    "a front end": {"timestamp": 1, "model": "x", "created_at": "today", "feedback": {"stars": 5}},
    "names": {"name": "helper"},
}


@pytest.mark.parametrize("added", ADDED_TO_ANSWERS.values(), ids=ADDED_TO_ANSWERS)
def test_what_was_added_to_an_answer_changes_nothing(prompt_of, added):
    plain = prompt_of(ASK, PLAIN, ASK)
    assert "Hello!" in plain
    assert prompt_of(ASK, PLAIN | added, ASK) == plain


@pytest.mark.parametrize(
    "added",
    [
        {"index": 0},
        {"provider_specific_fields": None, "extra_content": {"google": {"thought_signature": "x"}}},
        {"function": CALL["function"] | {"parsed_arguments": {"city": "Oslo"}}},
        {"function": CALL["function"] | {"strict": True, "output": None}},
        {"function": CALL["function"] | {"arguments": {"city": "Oslo"}}},
    ],
)
def test_what_was_added_to_a_call_changes_nothing(prompt_of, added):
    called = {"role": "assistant", "content": None}
    plain = prompt_of(ASK, called | {"tool_calls": [CALL]}, RESULT)
    assert prompt_of(ASK, called | {"tool_calls": [CALL | added]}, RESULT) == plain


@pytest.mark.parametrize("arguments", ["", " ", "{}", {}])
def test_a_call_without_arguments_goes_back(prompt_of, arguments):
    call = CALL | {"function": {"name": "now", "arguments": arguments}}
    assert "now\n{}" in prompt_of(ASK, {"role": "assistant", "tool_calls": [call]}, RESULT)


@pytest.mark.parametrize(
    "added",
    [
        {"name": "get_weather"},
        {"artifact": {"raw": 1}, "status": "success", "id": "x", "type": "tool", "additional_kwargs": {}},
        {"is_error": False, "tool_name": "get_weather", "cache_control": {"type": "ephemeral"}},
        {"content": [{"type": "text", "text": RESULT["content"], "cache_control": {"type": "ephemeral"}}]},
        {"content": [{"type": "text", "text": RESULT["content"], "annotations": None, "meta": {}}]},
    ],
)
def test_what_was_added_to_a_result_changes_nothing(prompt_of, added):
    called = {"role": "assistant", "tool_calls": [CALL]}
    assert prompt_of(ASK, called, RESULT | added) == prompt_of(ASK, called, RESULT)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "Hel", "id": "1", "index": 0}, {"type": "text", "text": "lo!"}], "Hello!"),
        ([{"type": "output_text", "text": "Hello!", "annotations": [], "logprobs": []}], "Hello!"),
        ([{"type": "refusal", "refusal": "Hello!"}], "Hello!"),
        (
            [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "Hello!"}],
            "Hello!",
        ),
        ([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "Hello!"}], "Hello!"),
    ],
)
def test_parts_of_answers(prompt_of, content, text):
    assert prompt_of(ASK, PLAIN | {"content": content}, ASK) == prompt_of(ASK, PLAIN | {"content": text}, ASK)


def test_a_refusal_is_what_an_assistant_said(prompt_of):
    refused = {"role": "assistant", "content": None, "refusal": "Hello!"}
    assert prompt_of(ASK, refused, ASK) == prompt_of(ASK, PLAIN, ASK)


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        # what would change the prompt, if it were not left out
        (ASK | {"images": ["aGk="]}, "messages[0].images", "not implemented"),
        (ASK | {"audio": {"id": "x"}}, "messages[0].audio", "not implemented"),
        (PLAIN | {"images": [{"url": "x"}]}, "messages[0].images", "not implemented"),
        (PLAIN | {"prefix": True}, "messages[0].prefix", "not implemented"),
        (
            PLAIN | {"function_call": {"name": "f", "arguments": ""}},
            "messages[0].function_call",
            "tool_calls",
        ),
        # slips of the pen
        (ASK | {"contents": "x"}, "messages[0].contents", "did you mean content?"),
        (ASK | {"parsed": "x"}, "messages[0].parsed", "no such option"),
        # parts that are no text
        *(
            (
                {"role": "user", "content": [{"type": kind, kind: {"url": "x"}}]},
                "messages[0].content[0]",
                f"reads text only, and no part of type '{kind}'; send parts as "
                '{"type": "text", "text": "..."}',
            )
            for kind in ("image_url", "input_audio", "file", "video_url")
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text", "required"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages[0].content[0].type", "required"),
    ],
)
def test_what_means_something_is_not_left_out(server, message, param, words):
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json={"model": MODEL, "messages": [message]}, timeout=30
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert "\n" not in error["message"]


NEUTRAL = {
    "n": 1,
    "store": False,
    "metadata": {},
    "modalities": ["text"],
    "service_tier": "auto",
    "verbosity": "medium",
    "prompt_cache_key": "session-1",
    "prompt_cache_retention": "in_memory",
    "safety_identifier": "somebody",
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "stop": [],
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "logprobs": False,
    "top_logprobs": 0,
    "stream": False,
    "stream_options": {"include_usage": False},
    "response_format": {"type": "text"},
    "ignore_eos": None,
    "skip_special_tokens": True,
    "min_tokens": 0,
    "length_penalty": 1.0,
}


@pytest.mark.parametrize("stream", [False, True])
def test_options_that_ask_for_what_happens_anyway(server, stream):
    body = {"model": MODEL, "messages": [ASK], "temperature": 0, "max_tokens": 5}
    asked = (
        body
        | NEUTRAL
        | {"stream": stream, "stream_options": {"include_obfuscation": False} if stream else None}
    )
    answers = [
        httpx.post(f"{server.url}/v1/chat/completions", json=given, timeout=30)
        for given in (body | {"stream": stream}, asked)
    ]
    assert [answer.status_code for answer in answers] == [200, 200], answers[1].text
    if not stream:
        assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_neutral_options_of_a_completion(server):
    body = {"model": MODEL, "prompt": "x", "temperature": 0, "max_tokens": 2}
    neutral = {"best_of": 1, "suffix": "", "echo": False, "n": 1, "logit_bias": {}, "use_beam_search": False}
    answer = httpx.post(f"{server.url}/v1/completions", json=body | neutral, timeout=30)
    assert answer.status_code == 200, answer.text


def test_true_is_not_one():
    from pydantic import ValidationError

    from glm4_runtime.server.schema import CompletionRequest

    with pytest.raises(ValidationError, match="best_of is not implemented"):
        CompletionRequest.model_validate({"model": "m", "prompt": "x", "best_of": True})


def test_messages_are_bounded_in_number():
    with pytest.raises(ValueError, match="at most 16384 items"):
        Message.model_validate({"role": "user", "content": [{"type": "text", "text": "x"}] * 16385})
