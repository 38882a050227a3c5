"""OpenAI's Responses API by its official client, and each field by the client's types."""

import base64
import json

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel
from sdk_types import events_of, strictly

from glm4_runtime.errors import DeadlineError, QueueFullError
from glm4_runtime.scheduler import Failed
from glm4_runtime.server.responses.schema import MessageItem, ReferenceItem
from glm4_runtime.server.responses.store import ApiError, ResponseStore, Stored

MODEL = "glm4-tiny"
WHO = [{"role": "user", "content": "Who are you?"}]
ABOUT = "I am glm4-tiny, a very small model for demonstrations. I have read a few old books."
ASKED = {"model": MODEL, "input": "Who are you?"}
GREEDY = ASKED | {"temperature": 0}
THOUGHT = ["\nLet", " me", " see.\n", "</th", "ink>", "\n\n", "It is", " noon."]
CALLS = ["I look.\n", 'get_time\n{"a"', ': "}\\n"}\n', "get_weather\n{", '"é": 1 }', "\n"]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city today.",
    "parameters": CITY,
    "strict": False,
}
TOOLS = [{"type": "function", "name": name} for name in ("get_time", "get_weather")]


def post(server, body, **headers):
    return httpx.post(f"{server.url}/v1/responses", json=body, headers=headers, timeout=60)


def stream_of(server, **asked):
    """The checked events of a stream."""
    answer = post(server, ASKED | asked | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer)
    for number, (name, data) in enumerate(events):
        assert (data["type"], data["sequence_number"]) == (name, number)
        strictly(ResponseStreamEvent, data)
    return [data for _, data in events]


def names_of(events):
    """The types of events; of equal ones in a row, one."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for name, before in zip(names, [None, *names], strict=False) if name != before]


# Text ----------------------------------------------------------------------------------------------


def test_an_answer(server, client):
    answer = client.responses.create(**GREEDY)
    assert (answer.output_text, answer.status, answer.model) == (ABOUT, "completed", MODEL)
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (9, 34, 43)
    whole = strictly(Response, post(server, GREEDY | {"metadata": {"a": "b"}}).json())
    assert (whole.temperature, whole.top_p, whole.tool_choice, whole.tools) == (0.0, 1.0, "auto", [])
    assert (whole.metadata, whole.parallel_tool_calls, whole.truncation) == ({"a": "b"}, True, "disabled")
    assert whole.text.format.type == "text"


def test_the_prompt_is_that_of_the_chat_route(client):
    said = [
        {"role": "developer", "content": "Be kind."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "Who are "}, {"type": "input_text", "text": "you?"}],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hello!", "annotations": []}]},
        {"type": "message", "role": "user", "content": "Say more."},
    ]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Say more."},
    ]
    one = client.responses.create(model=MODEL, input=said, instructions="Be brief.", max_output_tokens=1)
    other = client.chat.completions.create(model=MODEL, messages=chat, max_tokens=1)
    assert one.usage.input_tokens == other.usage.prompt_tokens
    assert one.instructions == "Be brief."


def test_the_events_of_a_text(server):
    events = stream_of(server, temperature=0)
    assert names_of(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    created, last = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert ("".join(deltas), len(deltas) > 20) == (ABOUT, True)
    assert events[-4]["text"] == events[-3]["part"]["text"] == ABOUT
    assert last["output"] == [events[-2]["item"]]
    assert (last["status"], last["usage"]["output_tokens"]) == ("completed", 34)
    assert len({event["item_id"] for event in events if "item_id" in event} | {events[-2]["item"]["id"]}) == 1


def test_the_client_gathers_a_stream(client):
    with client.responses.stream(**GREEDY) as stream:
        assert stream.get_final_response().output_text == ABOUT


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_cut_is_incomplete(server, stream):
    if stream:
        *_, last = stream_of(server, max_output_tokens=5)
        assert last["type"] == "response.incomplete"
        answer = strictly(Response, last["response"])
    else:
        answer = strictly(Response, post(server, ASKED | {"max_output_tokens": 5}).json())
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.output[0].status, answer.usage.output_tokens) == ("incomplete", 5)


def test_an_empty_reply_is_an_empty_message(scripted):
    _, server, client = scripted([""], [""])
    assert [item.content[0].text for item in client.responses.create(**ASKED).output] == [""]
    assert names_of(stream_of(server))[2:4] == ["output_item.added", "content_part.added"]


def test_log_probabilities_are_those_of_the_text(scripted, thinking_bundle):
    _, server, _ = scripted(THOUGHT, THOUGHT, bundle=thinking_bundle)
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = strictly(Response, post(server, ASKED | asked).json())
    (part,) = answer.output[1].content
    # of eight tokens five are thinking; of the rest, the first is white space and the last ends the reply
    assert [len(entry.top_logprobs) for entry in part.logprobs] == [2] * len(part.logprobs)
    assert 2 <= len(part.logprobs) <= 3
    told = [
        event["logprobs"]
        for event in stream_of(server, **asked)
        if event["type"].endswith("text.delta") and "logprobs" in event
    ]
    assert sum(map(len, told)) == len(part.logprobs)


# Tools ---------------------------------------------------------------------------------------------

ASK = {"role": "user", "content": "What is the weather in Oslo?"}
FOUND = '{"sky": "clear", "celsius": 18}'


def test_a_round_trip_with_a_tool(client):
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 60, "tools": [WEATHER]}
    called = client.responses.create(input=[ASK], **asked)
    (call,) = called.output
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "get_weather",
        {"city": "Oslo"},
    )
    result = {"type": "function_call_output", "call_id": call.call_id, "output": FOUND}
    parts = result | {"output": [{"type": "input_text", "text": FOUND}], "id": "fco_1", "status": "completed"}
    for items in (
        [ASK, *called.output, result],
        [ASK, *(item.to_dict() for item in called.output), parts],
        [ASK, {"type": "item_reference", "id": call.id}, result],
    ):
        assert "18 degrees" in client.responses.create(input=items, **asked).output_text
    told = client.responses.create(input=[result], previous_response_id=called.id, **asked)
    assert "18 degrees" in told.output_text
    assert told.previous_response_id == called.id


def test_parallel_calls_and_their_events(scripted):
    _, server, client = scripted(CALLS, CALLS, ["x"], ["x"])
    events = stream_of(server, tools=TOOLS)
    call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert names_of(events)[8:] == [*call, *call, "completed"]
    done = [event["arguments"] for event in events if event["type"].endswith("arguments.done")]
    assert [json.loads(text) for text in done] == [{"a": "}\n"}, {"é": 1}]
    assert [event["output_index"] for event in events if event["type"].endswith("item.done")] == [0, 1, 2]
    text, first, second = strictly(Response, post(server, ASKED | {"tools": TOOLS}).json()).output
    assert (text.content[0].text, first.name, second.name) == ("I look.", "get_time", "get_weather")
    assert first.call_id != second.call_id
    results = [{"type": "function_call_output", "call_id": c.call_id, "output": "x"} for c in (first, second)]
    for told in (results, results[::-1]):
        client.responses.create(model=MODEL, input=[*WHO, text, first, second, *told], tools=TOOLS)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_time", "get_weather"}),
        ({"type": "function", "name": "get_time"}, {"get_time"}),
        ("none", set()),
    ],
)
def test_a_choice_of_tools_is_kept(client, choice, names):
    tools = [WEATHER, WEATHER | {"name": "get_time"}]
    answer = client.responses.create(**GREEDY, tools=tools, tool_choice=choice, parallel_tool_calls=False)
    called = {item.name for item in answer.output if item.type == "function_call"}
    assert (called <= names, len(called)) == (True, 1 if names else 0)
    assert answer.parallel_tool_calls is False


def test_calls_of_several_items_are_one_turn(scripted):
    scheduler, _, client = scripted(["x"], ["x"])
    calls = [
        {"type": "function_call", "call_id": key, "name": name, "arguments": "{}"}
        for key, name in (("a", "get_time"), ("b", "get_weather"))
    ]
    results = [{"type": "function_call_output", "call_id": key, "output": f"of {key}"} for key in "ab"]
    client.responses.create(
        model=MODEL, input=[*WHO, {"role": "assistant", "content": "I look."}, *calls, *results]
    )
    chat_calls = [
        {"id": call["call_id"], "type": "function", "function": {"name": call["name"], "arguments": "{}"}}
        for call in calls
    ]
    chat = [
        *WHO,
        {"role": "assistant", "content": "I look.", "tool_calls": chat_calls},
        *({"role": "tool", "tool_call_id": key, "content": f"of {key}"} for key in "ab"),
    ]
    client.chat.completions.create(model=MODEL, messages=chat)
    first, second = (request.prompt_ids for request in scheduler.requests)
    assert first == second


# Thinking and formats ------------------------------------------------------------------------------


def test_thinking_is_an_item_and_goes_back(scripted, thinking_bundle):
    scheduler, _, client = scripted(THOUGHT, THOUGHT, ["x"], ["x"], bundle=thinking_bundle)
    answer = client.responses.create(**ASKED, include=["reasoning.encrypted_content"])
    thought, message = answer.output
    assert (thought.type, thought.content[0].text, thought.summary) == ("reasoning", "Let me see.", [])
    assert base64.b64decode(thought.encrypted_content) == b"Let me see."
    assert answer.output_text == "It is noon."
    assert answer.usage.output_tokens_details.reasoning_tokens == 5
    summed = client.responses.create(**ASKED, reasoning={"summary": "auto", "effort": "medium"})
    assert [part.text for part in summed.output[0].summary] == ["Let me see."]
    assert summed.reasoning.summary == "auto"
    client.responses.create(model=MODEL, input=[*WHO, thought, message, *WHO])
    plain = {"role": "assistant", "content": "It is noon."}
    client.responses.create(model=MODEL, input=[*WHO, plain, *WHO])
    assert scheduler.requests[2].prompt_ids == scheduler.requests[3].prompt_ids


@pytest.mark.parametrize(
    ("asked", "part", "text"),
    [
        ({}, "content_part", "reasoning_text"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning_summary_part", "reasoning_summary_text"),
    ],
)
def test_the_events_of_thinking(scripted, thinking_bundle, asked, part, text):
    _, server, _ = scripted(THOUGHT, bundle=thinking_bundle)
    events = stream_of(server, **asked)
    assert names_of(events)[2:8] == [
        "output_item.added", f"{part}.added", f"{text}.delta", f"{text}.done", f"{part}.done", "output_item.done",
    ]  # fmt: skip
    assert [event["item"]["type"] for event in events if event["type"].endswith("item.done")] == [
        "reasoning",
        "message",
    ]


def test_a_model_that_thinks_cannot_be_kept_from_it(scripted, thinking_bundle):
    _, _, client = scripted(["x"])
    assert client.responses.create(**ASKED, reasoning={"effort": "none"}).output_text == "x"
    _, _, client = scripted(["x"], bundle=thinking_bundle)
    with pytest.raises(openai.BadRequestError, match="always thinks"):
        client.responses.create(**ASKED, reasoning={"effort": "none"})


class Person(BaseModel):
    sure: bool


def test_structured_output(client):
    assert isinstance(client.responses.parse(**GREEDY, text_format=Person).output_parsed, Person)
    answer = client.responses.create(
        **GREEDY, text={"format": {"type": "json_object"}}, max_output_tokens=200
    )
    assert answer.text.format.type == "json_object"
    if answer.status == "completed":
        assert isinstance(json.loads(answer.output_text), dict)


# Stored responses ----------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_a_stored_response(scripted):
    scheduler, _, client = scripted(["one"], ["two"], ["three"], ["x"])
    first = client.responses.create(**ASKED, instructions="Be brief.")
    second = client.responses.create(model=MODEL, input="And?", previous_response_id=first.id)
    third = client.responses.create(
        model=MODEL, input="More.", previous_response_id=second.id, instructions="Be kind."
    )
    chat = [
        {"role": "system", "content": "Be kind."},
        *WHO,
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "More."},
    ]
    client.chat.completions.create(model=MODEL, messages=chat)
    assert scheduler.requests[2].prompt_ids == scheduler.requests[3].prompt_ids
    assert client.responses.retrieve(third.id) == third


def test_stored_responses_are_read_and_deleted(scripted):
    _, server, client = scripted(["one"], ["two"])
    answer = client.responses.create(**ASKED, metadata={"a": "b"})
    path = f"{server.url}/v1/responses/{answer.id}"
    assert strictly(Response, httpx.get(path).json()).output_text == "one"
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(answer.id)
    assert httpx.get(path, params={"stream": "true"}).status_code == 400
    assert httpx.delete(path).json() == {"id": answer.id, "object": "response", "deleted": True}
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            ask(answer.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(**ASKED, previous_response_id=answer.id)
    assert caught.value.param == "previous_response_id"
    unstored = client.responses.create(**ASKED, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'glm4_http_requests_total{route="/v1/responses/{response_id}",status="200"} 2.0' in metrics


def test_a_stream_is_stored_too(scripted):
    _, server, client = scripted(["one"])
    *_, last = stream_of(server)
    assert client.responses.retrieve(last["response"]["id"]).output_text == "one"


def test_a_response_belongs_to_the_key_of_its_request(scripted):
    _, _, client = scripted(["one"], api_keys=("mine", "other"))
    answer = client.responses.create(**ASKED)
    other = client.with_options(api_key="other")
    for ask in (
        lambda: other.responses.retrieve(answer.id),
        lambda: other.responses.delete(answer.id),
        lambda: other.responses.create(**ASKED, previous_response_id=answer.id),
        lambda: other.responses.create(
            model=MODEL, input=[{"type": "item_reference", "id": answer.output[0].id}]
        ),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    assert client.responses.retrieve(answer.id).output_text == "one"


def test_a_server_that_stores_nothing_says_so(scripted):
    _, _, client = scripted(["one"], max_stored=0)
    answer = client.responses.create(**ASKED)
    for ask in (
        lambda: client.responses.create(**ASKED, store=True),
        lambda: client.responses.create(**ASKED, previous_response_id=answer.id),
        lambda: client.responses.create(model=MODEL, input=[{"type": "item_reference", "id": "msg_1"}]),
        lambda: client.responses.retrieve(answer.id),
        lambda: client.responses.delete(answer.id),
    ):
        with pytest.raises(openai.BadRequestError, match="stores no responses"):
            ask()


def stored(name, size=1, owner=b""):
    item = MessageItem(role="assistant", content=name)
    return Stored(owner, {"id": name}, (item,), {f"msg_{name}": item}, size)


def test_the_store_is_bounded_in_number_and_bytes():
    store = ResponseStore(3, most_bytes=100)
    for name in "abc":
        store.put(stored(name))
    store.get(b"", "a")
    store.put(stored("d"))
    assert len(store) == 3
    with pytest.raises(ApiError, match="'b'"):
        store.get(b"", "b")  # not used for longest
    store.put(stored("e", size=99))
    assert [store.get(b"", name).response["id"] for name in ("d", "e")] == ["d", "e"]
    assert len(store) == 2
    store.put(stored("huge", size=101))
    assert len(store) == 0
    store.put(stored("f", size=100))
    assert len(store) == 1
    with pytest.raises(ApiError, match="no stored item"):
        store.resolved(b"other", [ReferenceItem(type="item_reference", id="msg_f")])


# Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (QueueFullError("9 are waiting", 7.4), openai.RateLimitError, "queue_full"),
        (Failed(DeadlineError("late")), openai.InternalServerError, "request_timeout"),
    ],
)
def test_failures_have_their_status(scripted, error, kind, code):
    _, _, client = scripted(error, error)
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            client.responses.create(**ASKED, stream=stream)
        assert caught.value.code == code


def test_a_failure_within_a_stream_is_an_event(scripted):
    _, server, client = scripted(["\nHe", "llo", Failed(DeadlineError("late")), "never"])
    *_, before, last = stream_of(server)
    assert (before["type"], last["type"]) == ("response.output_text.delta", "response.failed")
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last["response"]["id"])


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,aGk="}
REFUSED = [
    ({"background": True}, "background", "background is not implemented by this server; leave it out or set it to false"),
    ({"conversation": "conv_1"}, "conversation", "not implemented"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "not implemented"),
    ({"truncation": "auto"}, "truncation", "set it to \"disabled\""),
    ({"service_tier": "flex"}, "service_tier", "not implemented"),
    ({"context_management": [{"type": "compaction"}]}, "context_management", "not implemented"),
    ({"moderation": {"model": "m"}}, "moderation", "not implemented"),
    ({"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options.include_obfuscation", "not implemented"),
    ({"include": ["file_search_call.results"]}, "include[0]", "reasoning.encrypted_content"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort", "does not think"),
    ({"reasoning": {"summary": "concise"}}, "reasoning.summary", "'auto' or 'detailed'"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "not implemented"),
    ({"text": {"format": {"type": "xml"}}}, "text.format", "json_schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "q"}}}}, None, "cannot be enforced"),
    ({"max_tokens": 5}, "max_tokens", "there is no such option; use max_output_tokens"),
    ({"response_format": {}}, "response_format", "there is no such option; use text.format"),
    ({"messages": WHO}, "messages", "POST messages to /v1/chat/completions"),
    ({"n": 2}, "n", "no such option"),
    ({"top_logprobs": 2}, "top_logprobs", "goes with message.output_text.logprobs"),
    ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ({"metadata": {"a": "x" * 513}}, "metadata", "at most 512"),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
    ({"input": []}, "input", "at least 1"),
    ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, None, "the conversation has 0 messages"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0]", "no part of type 'input_image'"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0]", "input_file"),
    ({"input": [{"type": "computer_call_output", "call_id": "c"}]}, "input[0]",
     "this server has no items of type 'computer_call_output'; it takes function_call,"),
    ({"input": [*WHO, {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "namespace": "x"}]},
     "input[1].namespace", "not implemented"),
    ({"input": [*WHO, {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}]}, None,
     "input[1] calls tools, but no message answers: a"),
    ({"input": [*WHO, {"type": "function_call_output", "call_id": "a", "output": "x"}]}, None,
     "input[1] answers the call 'a', but does not follow"),
    ({"input": [{"role": "user", "content": "x", "colour": "red"}]}, "input[0].colour", "no such option"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "this server runs no tools, and has none of type 'web_search'"),
    ({"tools": [{"type": "custom", "name": "f"}]}, "tools[0]", "none of type 'custom'"),
    ({"tools": [TOOLS[0] | {"defer_loading": True}]}, "tools[0].defer_loading", "not implemented"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "same name"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "get_time, get_weather"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice",
     "no choice of type 'allowed_tools' is implemented"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"temperature": -1}, None, "temperature"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "param", "words"), REFUSED)
def test_what_cannot_be_served_is_refused(server, asked, param, words):
    answer = post(server, ASKED | asked)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    if param is not None:
        assert error["param"].startswith(param)


NEUTRAL = {
    "background": False, "conversation": None, "include": [], "instructions": "", "max_tool_calls": 5,
    "metadata": {}, "moderation": None, "parallel_tool_calls": True, "previous_response_id": None, "prompt": None,
    "prompt_cache_key": "k", "prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "in_memory",
    "reasoning": {"effort": "medium", "context": "auto", "mode": "standard"}, "safety_identifier": "s", "service_tier": "auto",
    "store": None, "stream": False, "stream_options": None, "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto", "tools": [], "top_logprobs": 0, "truncation": "disabled", "user": "u", "context_management": [],
}  # fmt: skip


def test_options_that_ask_for_what_happens_anyway(server):
    plain, neutral = (post(server, GREEDY | more) for more in ({}, NEUTRAL))
    assert neutral.status_code == 200, neutral.text
    strictly(Response, neutral.json())
    texts = [answer.json()["output"][0]["content"][0]["text"] for answer in (plain, neutral)]
    assert texts == [ABOUT, ABOUT]


def test_long_instructions_and_thirty_tools(scripted):
    scheduler, _, client = scripted(["yes"])
    tools = [{"type": "function", "name": f"tool_{index}"} for index in range(30)]
    answer = client.responses.create(**ASKED, instructions="word " * 300, tools=tools)
    assert answer.usage.input_tokens == len(scheduler.requests[0].prompt_ids) > 700
    assert len(answer.tools) == 30
