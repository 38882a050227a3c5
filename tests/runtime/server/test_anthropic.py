"""Anthropic's Messages API by its official client, and each field by the client's types."""

import json
import time

import anthropic
import httpx
import pytest
from anthropic.types import Message, ModelInfo, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import BaseModel
from sdk_types import events_of, strictly

from glm4_runtime.errors import DeadlineError, QueueFullError
from glm4_runtime.generate import Token
from glm4_runtime.scheduler import Failed, Generated
from glm4_runtime.server import log

MODEL = "glm4-tiny"
WHO = [{"role": "user", "content": "Who are you?"}]
ABOUT = "I am glm4-tiny, a very small model for demonstrations. I have read a few old books."
ASKED = {"model": MODEL, "messages": WHO, "max_tokens": 100}
THOUGHT = ["\nLet", " me", " see.\n", "</th", "ink>", "\n\n", "It is", " noon."]
CALLS = ["I look.\n", 'get_time\n{"a"', ': "}\\n"}\n', "get_weather\n{", '"é": 1 }', "\n"]
FREE = {"type": "object"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "The weather of a city today.", "input_schema": CITY}
TOOLS = [{"name": name, "input_schema": FREE} for name in ("get_time", "get_weather")]


def client_of(server, **options):
    return anthropic.Anthropic(
        base_url=server.url, **{"api_key": "none", "max_retries": 0, "timeout": 60} | options
    )


@pytest.fixture(scope="module")
def claude(server):
    with client_of(server) as client:
        yield client


@pytest.fixture
def claude_of(scripted):
    """A function that serves scripted replies; returns the scheduler and a client."""

    def serve(*replies, **options):
        scheduler, server, _ = scripted(*replies, **options)
        return scheduler, client_of(server)

    return serve


def post(server, body, path="/v1/messages", **headers):
    return httpx.post(server.url + path, json=body, headers=headers, timeout=60)


def stream_of(server, **asked):
    """The checked events of a stream."""
    answer = post(server, ASKED | asked | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer)
    assert all(name == data["type"] for name, data in events)
    for _, data in events:
        if data["type"] not in ("ping", "error"):
            strictly(RawMessageStreamEvent, data)
    return [data for _, data in events]


# Text ----------------------------------------------------------------------------------------------


def test_an_answer(server, claude):
    answer = claude.messages.create(**ASKED, extra_body={"temperature": 0})
    assert [block.text for block in answer.content] == [ABOUT]
    assert (answer.stop_reason, answer.stop_sequence, answer.model, answer.role) == (
        "end_turn",
        None,
        MODEL,
        "assistant",
    )
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == 9
    assert (usage.output_tokens, usage.cache_creation_input_tokens) == (34, 0)
    strictly(Message, post(server, ASKED).json())


def test_the_answer_is_that_of_the_chat_route(client, claude):
    asked = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 12}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]},
        {"role": "user", "content": "Say more."},
    ]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    count = claude.messages.count_tokens(model=MODEL, messages=messages, system=system).input_tokens
    chat = [{"role": "system", "content": "Be brief."}, *messages]
    usage = client.chat.completions.create(model=MODEL, messages=chat, **asked).usage
    assert count == usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences_are_named(claude, stream):
    asked = ASKED | {"stop_sequences": ["books", " model"], "extra_body": {"temperature": 0}}
    if stream:
        with claude.messages.stream(**asked) as events:
            answer = events.get_final_message()
    else:
        answer = claude.messages.create(**asked)
    assert answer.content[0].text == ABOUT.partition(" model")[0]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " model")


def test_max_tokens_and_the_context_are_told_apart(claude):
    cut = claude.messages.create(**ASKED | {"max_tokens": 5})
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)
    long = [{"role": "user", "content": "x " * 1015}]
    full = claude.messages.create(
        model=MODEL, messages=long, max_tokens=4000, extra_body={"temperature": 9.0, "top_k": 50}
    )
    total = full.usage.input_tokens + full.usage.cache_read_input_tokens + full.usage.output_tokens
    assert (full.stop_reason == "model_context_window_exceeded") == (total >= 2048)


def test_the_events_of_a_text(server):
    first, ping, start, *deltas, stop, last, end = stream_of(server, temperature=0)
    assert first["type"] == "message_start"
    assert first["message"]["content"] == []
    assert first["message"]["stop_reason"] is None
    assert first["message"]["usage"]["output_tokens"] == 0
    assert ping == {"type": "ping"}
    assert (start["type"], start["index"], start["content_block"]["type"]) == (
        "content_block_start",
        0,
        "text",
    )
    assert {delta["type"] for delta in deltas} == {"content_block_delta"}
    assert "".join(delta["delta"]["text"] for delta in deltas) == ABOUT
    assert len(deltas) > 20
    assert stop == {"type": "content_block_stop", "index": 0}
    assert last["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert last["usage"]["output_tokens"] == 34
    assert end == {"type": "message_stop"}


def test_a_reply_without_text_has_no_blocks(scripted):
    _, server, _ = scripted([""], [""])
    assert strictly(Message, post(server, ASKED).json()).content == []
    types = [event["type"] for event in stream_of(server)]
    assert types == ["message_start", "ping", "message_delta", "message_stop"]


# Tools ---------------------------------------------------------------------------------------------


def test_a_round_trip_with_a_tool(claude):
    ask = {"role": "user", "content": "What is the weather in Oslo?"}
    asked = {"model": MODEL, "max_tokens": 60, "tools": [WEATHER], "extra_body": {"temperature": 0}}
    called = claude.messages.create(messages=[ask], **asked)
    (call,) = [block for block in called.content if block.type == "tool_use"]
    assert (called.stop_reason, call.name, call.input) == ("tool_use", "get_weather", {"city": "Oslo"})
    assert call.id.startswith("toolu_")
    result = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": '{"sky": "clear", "celsius": 18}'}],
    }
    for earlier in (called.to_param(), called.to_dict(), {"role": "assistant", "content": called.content}):
        messages = [ask, earlier, {"role": "user", "content": [result]}]
        told = claude.messages.create(messages=messages, **asked)
        assert "18 degrees" in told.content[0].text
        assert told.stop_reason == "end_turn"


def test_parallel_calls_and_their_events(scripted):
    _, server, _ = scripted(CALLS, CALLS)
    whole = strictly(Message, post(server, ASKED | {"tools": TOOLS}).json())
    text, first, second = whole.content
    assert (text.text, whole.stop_reason) == ("I look.", "tool_use")
    assert (first.name, first.input) == ("get_time", {"a": "}\n"})
    assert (second.name, second.input) == ("get_weather", {"é": 1})
    assert first.id != second.id
    events = stream_of(server, tools=TOOLS)
    order = [(event["type"], event.get("index")) for event in events]
    expected = [("message_start", None), ("ping", None)]
    for index in range(3):
        expected.append(("content_block_start", index))
        expected.append(("content_block_delta", index))
        expected.append(("content_block_stop", index))
    assert list(dict.fromkeys(order)) == [*expected, ("message_delta", None), ("message_stop", None)]
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block.get("input") for block in blocks] == [None, {}, {}]
    pieces = [
        event["delta"]["partial_json"]
        for event in events
        if event.get("index") == 2 and event["type"] == "content_block_delta"
    ]
    assert json.loads("".join(pieces)) == {"é": 1}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_the_client_gathers_a_stream_of_calls(claude_of):
    _, client = claude_of(CALLS)
    with client.messages.stream(**ASKED, tools=TOOLS) as stream:
        final = stream.get_final_message()
    assert [block.input for block in final.content[1:]] == [{"a": "}\n"}, {"é": 1}]


def test_text_after_a_call_is_a_block_of_its_own(claude_of):
    _, client = claude_of(["get_time\n{}", "\n\nI wait."])
    blocks = client.messages.create(**ASKED, tools=TOOLS).content
    assert [block.type for block in blocks] == ["tool_use", "text"]
    assert blocks[1].text.strip() == "I wait."


def test_one_call_only_where_parallel_calls_are_off(claude_of):
    scheduler, client = claude_of([*CALLS, None, "never"])
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    answer = client.messages.create(**ASKED, tools=TOOLS, tool_choice=choice)
    assert [block.name for block in answer.content if block.type == "tool_use"] == ["get_time"]
    assert scheduler.tickets[0].cancelled.wait(5)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "any", "disable_parallel_tool_use": True}, {"get_time", "get_weather"}),
        ({"type": "tool", "name": "get_time", "disable_parallel_tool_use": True}, {"get_time"}),
        ({"type": "none"}, set()),
    ],
)
def test_a_choice_of_tools_is_kept(claude, choice, names):
    tools = [WEATHER, {"name": "get_time", "input_schema": CITY}]
    answer = claude.messages.create(**ASKED, tools=tools, tool_choice=choice, extra_body={"temperature": 0})
    called = [block for block in answer.content if block.type == "tool_use"]
    assert len(called) == (1 if names else 0)
    assert {block.name for block in called} <= names
    assert all(set(block.input) == {"city"} for block in called if answer.stop_reason == "tool_use")


def test_arguments_that_are_no_json_are_told(claude_of):
    _, client = claude_of(["get_time\n{'a': NaN, oops", None], ["get_time\n"])
    (call,) = client.messages.create(**ASKED, tools=TOOLS).content
    assert set(call.input) == {"INVALID_JSON"}
    assert "oops" in call.input["INVALID_JSON"]


def test_results_of_parallel_calls_may_come_in_any_order_and_several_messages(claude_of):
    scheduler, client = claude_of(["x"], ["x"], ["x"])
    calls = [
        {"type": "tool_use", "id": key, "name": name, "input": {}}
        for key, name in (("a", "get_time"), ("b", "get_weather"))
    ]
    results = [{"type": "tool_result", "tool_use_id": key, "content": f"of {key}"} for key in "ab"]
    said = {"role": "assistant", "content": [{"type": "text", "text": "I look."}, *calls]}
    for told in (
        [said, {"role": "user", "content": results}],
        [said, {"role": "user", "content": results[::-1]}],
        [
            {"role": "assistant", "content": said["content"][:2]},
            {"role": "assistant", "content": said["content"][2:]},
            {"role": "user", "content": results[:1]},
            {"role": "user", "content": results[1:]},
        ],
    ):
        client.messages.create(model=MODEL, max_tokens=9, messages=[*WHO, *told], tools=TOOLS)
    prompts = [request.prompt_ids for request in scheduler.requests]
    assert prompts[0] == prompts[1] == prompts[2]


def test_an_error_without_text_is_told_to_the_model(claude):
    def count(**result):
        call = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
        messages = [
            *WHO,
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"} | result]},
        ]
        return claude.messages.count_tokens(model=MODEL, messages=messages).input_tokens

    assert count(is_error=True) == count(content="error") > count()
    assert count(is_error=True, content="no such city") == count(content="no such city")


# Thinking ------------------------------------------------------------------------------------------


def test_thinking_is_a_block_and_goes_back(claude_of, thinking_bundle):
    scheduler, client = claude_of(THOUGHT, ["x"], ["x"], bundle=thinking_bundle)
    answer = client.messages.create(**ASKED, thinking={"type": "adaptive"})
    thought, text = answer.content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "Let me see.", "It is noon.")
    assert thought.signature
    assert answer.usage.output_tokens_details.thinking_tokens == 5
    plain = {"role": "assistant", "content": "It is noon."}
    for earlier in (answer.to_param(), plain):
        client.messages.create(model=MODEL, max_tokens=9, messages=[*WHO, earlier, *WHO])
    assert scheduler.requests[1].prompt_ids == scheduler.requests[2].prompt_ids


def test_the_events_of_thinking(scripted, thinking_bundle):
    _, server, _ = scripted(THOUGHT, bundle=thinking_bundle)
    events = stream_of(server)
    kinds = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert kinds == ["thinking_delta"] * 3 + ["signature_delta"] + ["text_delta"] * 2
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text"]


def test_thinking_may_be_left_out(scripted, thinking_bundle):
    _, server, _ = scripted(THOUGHT, THOUGHT, bundle=thinking_bundle)
    omitted = {"type": "adaptive", "display": "omitted"}
    thought, _ = strictly(Message, post(server, ASKED | {"thinking": omitted}).json()).content
    assert thought.thinking == ""
    kinds = [
        event["delta"]["type"]
        for event in stream_of(server, thinking=omitted)
        if event["type"] == "content_block_delta"
    ]
    assert kinds == ["signature_delta", "text_delta", "text_delta"]


def test_thinking_ends_with_its_budget(server_of, thinking_bundle):
    with server_of(thinking_bundle) as server, client_of(server) as client:
        asked = ASKED | {"max_tokens": 60, "extra_body": {"temperature": 0}}
        thinking = {"type": "enabled", "budget_tokens": 8}
        answer = client.messages.create(**asked, thinking=thinking)
        thought, said = answer.content
        closing = 6  # tokens of a newline and the closing tag
        assert answer.usage.output_tokens_details.thinking_tokens == 8 + closing
        assert thought.thinking
        assert said.text
        parsed = client.messages.parse(**asked, thinking=thinking, output_format=Person)
        assert isinstance(parsed.parsed_output, Person)
        called = client.messages.create(
            **asked, thinking=thinking, tools=TOOLS[:1], tool_choice={"type": "any"}
        )
        assert called.content[-1].type == "tool_use"


@pytest.mark.parametrize(("kind", "thinks"), [("adaptive", False), ("disabled", True)])
def test_thinking_is_as_the_model_does_it(claude_of, demo_bundle, thinking_bundle, kind, thinks):
    bundles = {True: thinking_bundle, False: demo_bundle}
    _, client = claude_of(["x"], bundle=bundles[thinks])
    for ask in (client.messages.create, client.messages.count_tokens):
        limit = {"max_tokens": 9} if ask == client.messages.create else {}
        with pytest.raises(anthropic.BadRequestError, match=r"thinking\.type"):
            ask(model=MODEL, messages=WHO, thinking={"type": kind}, **limit)
    _, client = claude_of(["x"], bundle=bundles[not thinks])
    assert client.messages.create(**ASKED, thinking={"type": kind}).content


# Structured output, long prompts, counts -----------------------------------------------------------


class Person(BaseModel):
    sure: bool


def test_a_parsed_answer(claude):
    answer = claude.messages.parse(**ASKED, output_format=Person)
    assert isinstance(answer.parsed_output, Person)


def test_long_system_prompts_and_thirty_tools(claude_of):
    scheduler, client = claude_of(["yes"], max_prompt_tokens=2000)
    tools = [{"name": f"tool_{index}", "input_schema": {"type": "object"}} for index in range(30)]
    asked = {"messages": WHO, "system": "word " * 300, "tools": tools, "model": MODEL}
    count = client.messages.count_tokens(**asked).input_tokens
    answer = client.messages.create(**asked, max_tokens=5)
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == count
    assert len(scheduler.requests[0].prompt_ids) == count > 900
    without = client.messages.count_tokens(**asked | {"tool_choice": {"type": "none"}}).input_tokens
    assert without < count - 200


def test_tokens_of_a_prompt_that_is_too_long_are_counted(claude):
    messages = [{"role": "user", "content": "x " * 5000}]
    assert claude.messages.count_tokens(model=MODEL, messages=messages).input_tokens > 5000
    with pytest.raises(anthropic.BadRequestError, match="this server takes 2048"):
        claude.messages.create(model=MODEL, messages=messages, max_tokens=5)


# Names, keys and models ----------------------------------------------------------------------------


def test_a_model_has_aliases(scripted):
    _, server, chat = scripted(["yes"], ["yes"], aliases=(f"claude-x={MODEL}", f"gpt/y={MODEL}"))
    client = client_of(server)
    answer = client.messages.create(**ASKED | {"model": "claude-x"})
    assert answer.model == "claude-x"
    assert chat.chat.completions.create(model="gpt/y", messages=WHO).model == "gpt/y"
    assert [model.id for model in chat.models.list()] == [MODEL, "claude-x", "gpt/y"]
    assert [model.id for model in client.models.list()] == [MODEL, "claude-x", "gpt/y"]
    assert client.models.retrieve("gpt/y").display_name == "gpt/y"
    with pytest.raises(anthropic.NotFoundError, match="'claude-x', 'gpt/y'"):
        client.messages.create(**ASKED | {"model": "claude-y"})


def test_models_in_anthropics_form(server):
    version = {"anthropic-version": "2023-06-01"}
    listed = httpx.get(f"{server.url}/v1/models", headers=version).json()
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, MODEL, MODEL)
    info = strictly(ModelInfo, httpx.get(f"{server.url}/v1/models/{MODEL}", headers=version).json())
    assert info.max_input_tokens == 2048
    assert abs(info.created_at.timestamp() - time.time()) < 3600
    assert listed["data"][0]["id"] == info.id


KEYS = [
    ({"x-api-key": "key"}, 200),
    ({"Authorization": "Bearer key"}, 200),
    ({"Authorization": "Bearer old", "x-api-key": "key"}, 200),
    ({"x-api-key": "wrong"}, 401),
    ({"x-api-key": ""}, 401),
    ({"Authorization": "Basic key"}, 401),
    ({"Authorization": "key"}, 401),
    ({}, 401),
]


def test_keys(scripted):
    _, server, _ = scripted(["yes"], ["yes"], ["yes"], api_keys=("key", "other"))
    for headers, status in KEYS:
        answer = post(server, ASKED, **headers)
        assert answer.status_code == status, headers
        if status == 401:
            assert strictly(ErrorResponse, answer.json()).error.type == "authentication_error"


# Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "type_"),
    [
        (QueueFullError("9 are waiting", 7.4), anthropic.RateLimitError, "rate_limit_error"),
        (Failed(DeadlineError("late")), anthropic.GatewayTimeoutError, "timeout_error"),
        (ZeroDivisionError("secret"), anthropic.InternalServerError, "api_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_have_their_status_and_type(claude_of, error, kind, type_, stream):
    _, client = claude_of(error)
    with pytest.raises(kind) as caught:
        client.messages.create(**ASKED, stream=stream)
    assert caught.value.type == type_
    assert caught.value.request_id.startswith("req_")
    assert strictly(ErrorResponse, caught.value.body).request_id == caught.value.request_id
    if kind is anthropic.RateLimitError:
        assert caught.value.response.headers["retry-after"] == "7"


def test_a_failure_within_a_stream_is_an_event(scripted):
    _, server, _ = scripted(["\nHe", "llo", Failed(DeadlineError("late")), "never"])
    events = stream_of(server)
    assert [event["type"] for event in events][-2:] == ["content_block_delta", "error"]
    assert strictly(ErrorResponse, events[-1]).error.type == "timeout_error"


def test_the_limits_of_the_server_hold_here_too(scripted, capfd):
    _, server, _ = scripted(["yes"], max_body_bytes=400, api_keys=("key",))
    keys = {"x-api-key": "key"}
    assert post(server, ASKED | {"metadata": {"user_id": "somebody"}}, **keys).status_code == 200
    large = post(server, ASKED | {"system": "x" * 400}, **keys)
    assert (large.status_code, strictly(ErrorResponse, large.json()).error.type) == (
        413,
        "invalid_request_error",
    )
    metrics = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer key"}).text
    assert 'glm4_http_requests_total{route="/v1/messages",status="200"} 1.0' in metrics
    log.flush()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (line,) = [line for line in lines if line.get("status") == 200 and line["path"] == "/v1/messages"]
    assert (line["user"], line["completion_tokens"], line["finish_reasons"]) == ("somebody", 1, ["stop"])


def test_a_draining_server_refuses(scripted):
    _, server, _ = scripted([None, "never"], drain_timeout=20)
    with httpx.stream(
        "POST", f"{server.url}/v1/messages", json=ASKED | {"stream": True}, timeout=60
    ) as first:
        assert first.status_code == 200
        server._served.drain()
        refused = post(server, ASKED)
        server._served.drain(at_once=True)
    assert refused.status_code == 503
    assert strictly(ErrorResponse, refused.json()).error.type == "overloaded_error"
    assert refused.headers["retry-after"] == "20"


def test_a_stop_sequence_in_a_call(scripted):
    last = Generated(Token(0, ' "x"}', -0.5, "stop", "END"), ())
    _, server, _ = scripted(["get_time\n", '{"a":', last])
    answer = strictly(Message, post(server, ASKED | {"tools": TOOLS, "stop_sequences": ["END"]}).json())
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "END")
    assert answer.content[0].input == {"a": "x"}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
TEXT = {"type": "text", "text": "x"}


def user(*blocks):
    return {"messages": [{"role": "user", "content": list(blocks)}]}


REFUSED = [
    (user(IMAGE), "messages[0].content[0]: this model reads text only, and no block of type 'image'"),
    (user({"type": "document", "source": {}}), "no block of type 'document'"),
    (user({"type": "search_result"}), "no block of type 'search_result'"),
    ({"messages": [*WHO, {"role": "assistant", "content": [CALL]},
                   {"role": "user", "content": [RESULT | {"content": [IMAGE]}]}]},
     "messages[2].content[0].content[0]: this model reads text only"),
    (user(CALL), "messages[0]: a message of role user has no block of type tool_use"),
    (user(TEXT, RESULT), "tool_result come before the text"),
    (user(), "needs content"),
    (user(RESULT), "messages[0] answers the call 'a', but does not follow"),
    ({"messages": [*WHO, {"role": "assistant", "content": [CALL]}, *WHO]}, "messages[1] calls tools, but no message"),
    ({"messages": [*WHO, {"role": "assistant", "content": [CALL, CALL]}, {"role": "user", "content": [RESULT]}]},
     "messages[1] has calls with the same id"),
    ({"messages": [*WHO, {"role": "assistant", "content": [CALL]},
                   {"role": "user", "content": [RESULT | {"tool_use_id": "b"}]}]},
     "messages[2] answers the call 'b', which is not open"),
    ({"messages": [*WHO, {"role": "assistant", "content": "I am"}]}, "does not continue an answer"),
    ({"messages": []}, "at least 1"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "greater than or equal to 1"),
    ({"stop_sequences": ["x"] * 17}, "at most 16"),
    ({"stop": ["x"]}, "there is no such option; use stop_sequences"),
    ({"response_format": {}}, "there is no such option; use output_config.format"),
    ({"max_completion_tokens": 5}, "there is no such option; use max_tokens"),
    ({"n": 2}, "there is no such option"),
    ({"container": "c"}, "container is not implemented"),
    ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management is not implemented"),
    ({"mcp_servers": [{"name": "x"}]}, "mcp_servers is not implemented"),
    ({"inference_geo": "eu"}, "inference_geo is not implemented"),
    ({"diagnostics": {}}, "diagnostics is not implemented"),
    ({"service_tier": "priority"}, "service_tier is not implemented"),
    ({"speed": "fast"}, "speed is not implemented"),
    ({"output_config": {"effort": "low"}}, "output_config.effort is 'low', but this model does not think"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "q"}}}}, "cannot be enforced"),
    ({"cache_control": {"type": "forever"}}, "cache_control.type"),
    ({"metadata": {"name": "x"}}, "metadata.name"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"thinking": {"type": "enabled"}}, "budget_tokens goes with type enabled"),
    ({"thinking": {"type": "adaptive", "budget_tokens": 9}}, "budget_tokens goes with type enabled"),
    ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "this model does not think"),
    ({"system": [IMAGE]}, "system[0]: this model reads text only"),
    ({"tools": [{"type": "web_search_20260318", "name": "web_search"}]},
     "tools[0]: this server runs no tools, and has none of type 'web_search_20260318'"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"name": "no spaces", "input_schema": FREE}]}, "tools[0].name"),
    ({"tools": [TOOLS[0] | {"defer_loading": True}]}, "defer_loading is not implemented"),
    ({"tools": [TOOLS[0] | {"eager_input_streaming": False}]}, "eager_input_streaming is not implemented"),
    ({"tools": [TOOLS[0] | {"input_examples": [{}]}]}, "input_examples is not implemented"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "two tools have the same name"),
    ({"tools": TOOLS, "tool_choice": {"type": "required"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "f"}}, "the tools are: get_time, get_weather"),
    ({"tool_choice": {"type": "any"}}, "there are no tools"),
    ({"temperature": -1}, "temperature"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "words"), REFUSED)
def test_what_cannot_be_served_is_refused(server, asked, words):
    body = {name: value for name, value in (ASKED | asked).items() if value is not None}
    answer = post(server, body)
    error = strictly(ErrorResponse, answer.json())
    assert (answer.status_code, error.error.type) == (400, "invalid_request_error")
    assert words in error.error.message
    assert "\n" not in error.error.message
    assert answer.headers["request-id"] == error.request_id


NEUTRAL = {
    "container": None, "context_management": {"edits": []}, "inference_geo": None, "mcp_servers": [],
    "service_tier": "auto", "speed": "standard", "output_config": {"effort": "high"}, "metadata": {"user_id": "u"},
    "stop_sequences": [], "tools": [], "tool_choice": {"type": "auto"}, "system": "", "stream": False,
    "cache_control": {"type": "ephemeral"}, "thinking": {"type": "disabled"}, "diagnostics": None,
}  # fmt: skip


def test_options_that_ask_for_what_happens_anyway(server):
    plain, neutral = (post(server, ASKED | more | {"temperature": 0}) for more in ({}, NEUTRAL))
    assert neutral.status_code == 200, neutral.text
    assert neutral.json()["content"] == plain.json()["content"]


def test_fields_that_clients_add_to_blocks_change_nothing(server):
    blocks = [
        {"type": "text", "text": "Who", "citations": None, "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": " are you?", "id": "1", "index": 0},
    ]
    tools = [
        TOOLS[0] | {"type": "custom", "cache_control": {"type": "ephemeral"}, "allowed_callers": ["direct"]}
    ]
    call = CALL | {"caller": {"type": "direct"}, "toolset_name": None, "cache_control": {"type": "ephemeral"}}
    earlier = {"role": "assistant", "content": [call], "id": "msg_1", "stop_reason": "tool_use", "usage": {}}
    counts = [
        post(
            server, {"model": MODEL, "messages": messages, "tools": offered}, "/v1/messages/count_tokens"
        ).json()
        for messages, offered in (
            (
                [*WHO, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [RESULT]}],
                TOOLS[:1],
            ),
            ([{"role": "user", "content": blocks}, earlier, {"role": "user", "content": [RESULT]}], tools),
        )
    ]
    assert counts[0] == counts[1]
    assert counts[0]["input_tokens"] > 20


def test_the_body_of_a_wrong_type_is_refused_in_this_form(server):
    for options in ({"content": b"{"}, {"content": b"[1]"}, {"content": b"{}"}):
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{server.url}/v1/messages", headers=headers, **options)
        assert answer.status_code == 400
        strictly(ErrorResponse, answer.json())
    assert strictly(ErrorResponse, httpx.get(f"{server.url}/v1/messages").json()).error.type
