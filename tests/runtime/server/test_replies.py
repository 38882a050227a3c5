"""Replies from a script, where the demo model would never give them: thoughts, several calls, odd cuts."""

import json
import socket
import threading
import time

import openai
import pytest
from bundles import rehash

from glm4_runtime.errors import DeadlineError, ModelError, QueueFullError, RequestError, StoppedError
from glm4_runtime.scheduler import Failed
from glm4_runtime.server import log
from glm4_runtime.server.served_model import ServedModel

MODEL = "glm4-tiny"
PATIENCE = 60  # seconds after which a test holds that nothing will happen any more
WHO = [{"role": "user", "content": "Who are you?"}]
ASKED = {"model": MODEL, "messages": WHO}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("get_time", "get_weather")]
THOUGHT = ["\nLet", " me", " see.\n", "</th", "ink>", "\n\n", "It is", " noon."]
CALLS = [
    "I",
    " look.",
    "\n",
    "get",
    "_time\n",
    '{"a"',
    ': "}\\n',
    '"',
    "}\n",
    "get_weather\n{",
    '"é": 1 }',
    "\n",
]


def pieces_of(stream):
    content, reasoning, calls = [], [], {}
    for chunk in stream:
        delta = chunk.choices[0].delta
        content += [delta.content] if delta.content else []
        thought = getattr(delta, "reasoning_content", None)
        reasoning += [thought] if thought else []
        for call in delta.tool_calls or []:
            known = calls.setdefault(call.index, [call.id, call.function.name, ""])
            known[2] += call.function.arguments or ""
    return content, reasoning, list(calls.values()), chunk.choices[0].finish_reason


def test_a_thought_is_told_apart(scripted, thinking_bundle):
    _, _, client = scripted(THOUGHT, THOUGHT, bundle=thinking_bundle)
    (choice,) = client.chat.completions.create(**ASKED).choices
    assert choice.message.content == "It is noon."
    assert choice.message.reasoning_content == "Let me see."
    content, reasoning, _, reason = pieces_of(client.chat.completions.create(**ASKED, stream=True))
    assert content == ["It is", " noon."]
    assert reasoning == ["Let", " me", " see."]
    assert reason == "stop"


def test_thought_tokens_are_counted(scripted, thinking_bundle):
    _, _, client = scripted(THOUGHT, bundle=thinking_bundle)
    usage = client.chat.completions.create(**ASKED).usage
    assert usage.completion_tokens == 8
    assert usage.completion_tokens_details.reasoning_tokens == 5
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_a_reply_may_open_the_thought_itself(scripted):
    _, _, client = scripted(["<th", "ink>so", "</think>\n", "yes"])
    (choice,) = client.chat.completions.create(**ASKED).choices
    assert (choice.message.content, choice.message.reasoning_content) == ("yes", "so")


def test_a_thought_without_an_end_is_all_there_is(scripted, thinking_bundle):
    _, _, client = scripted(["so", " it"], bundle=thinking_bundle)
    (choice,) = client.chat.completions.create(**ASKED).choices
    assert (choice.message.content, choice.message.reasoning_content) == ("", "so it")


def test_thoughts_stay_out_of_the_history(scripted, thinking_bundle):
    scheduler, _, client = scripted(["x"], ["x"], ["x"], bundle=thinking_bundle)
    plain = [*WHO, {"role": "assistant", "content": "yes"}, *WHO]
    for said in (
        {"content": "yes"},
        {"content": "yes", "reasoning_content": "so it is"},
        {"content": "<think>so it is</think>\n\nyes"},
    ):
        client.chat.completions.create(
            model=MODEL, messages=[plain[0], {"role": "assistant"} | said, plain[2]]
        )
    prompts = [request.prompt_ids for request in scheduler.requests]
    assert prompts[0] == prompts[1] == prompts[2]


def test_a_constrained_reply_thinks_first(scripted, thinking_bundle):
    scheduler, _, client = scripted(THOUGHT, bundle=thinking_bundle)
    form = {"type": "regex", "regex": "[0-9]"}
    client.chat.completions.create(**ASKED, extra_body={"response_format": form})
    mask = scheduler.requests[0].mask
    import numpy as np

    from glm4_runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(thinking_bundle)
    for token in tokenizer.encode("\nLet me 7 see </think>\n7", add_special_tokens=False):
        logits = np.zeros(2048, np.float32)
        mask.apply(logits)
        assert logits[token] == 0
        mask.advance(token)
    assert mask.finished


def test_several_calls_in_a_row(scripted):
    expected = [("get_time", '{"a": "}\\n"}'), ("get_weather", '{"é": 1 }')]
    _, _, client = scripted(CALLS, CALLS)
    (choice,) = client.chat.completions.create(**ASKED, tools=TOOLS).choices
    assert choice.message.content == "I look."
    assert choice.finish_reason == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == expected
    assert len({call.id for call in choice.message.tool_calls}) == 2
    content, _, calls, reason = pieces_of(client.chat.completions.create(**ASKED, tools=TOOLS, stream=True))
    assert ("".join(content), reason) == ("I look.", "tool_calls")
    assert [(name, arguments) for _, name, arguments in calls] == expected


def test_one_call_only_where_parallel_calls_are_off(scripted):
    scheduler, _, client = scripted([*CALLS, None, "never"], CALLS)
    (choice,) = client.chat.completions.create(**ASKED, tools=TOOLS, parallel_tool_calls=False).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["get_time"]
    assert choice.finish_reason == "tool_calls"
    assert scheduler.tickets[0].cancelled.wait(5)


def test_the_model_may_begin_a_turn_of_its_own(scripted):
    reply = ["\nLet me see.", "", "get_time\n{}", "", "get_weather\n{}"]
    _, _, client = scripted(reply, token_ids={"": 2046})
    (choice,) = client.chat.completions.create(**ASKED, tools=TOOLS).choices
    assert choice.message.content == "Let me see."
    assert [call.function.name for call in choice.message.tool_calls] == ["get_time", "get_weather"]


def test_without_tools_nothing_is_a_call(scripted):
    _, _, client = scripted(["get_time\n{}"])
    (choice,) = client.chat.completions.create(**ASKED).choices
    assert (choice.message.content, choice.message.tool_calls) == ("get_time\n{}", None)


def test_results_are_put_into_the_order_of_the_calls(scripted):
    scheduler, _, client = scripted(["x"], ["x"])
    calls = [
        {"id": key, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for key, name in (("a", "get_time"), ("b", "get_weather"))
    ]
    results = [{"role": "tool", "tool_call_id": key, "content": f"of {key}"} for key in "ab"]
    for told in (results, results[::-1]):
        messages = [*WHO, {"role": "assistant", "tool_calls": calls}, *told]
        client.chat.completions.create(model=MODEL, messages=messages)
    first, second = (request.prompt_ids for request in scheduler.requests)
    assert first == second


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RequestError("no such thing"), openai.BadRequestError, "no such thing"),
        (QueueFullError("9 are waiting", 7.4), openai.RateLimitError, "9 are waiting"),
        (StoppedError("it is stopping"), openai.InternalServerError, "it is stopping"),
        (Failed(DeadlineError("late")), openai.InternalServerError, "longer than this server allows"),
        (Failed(RequestError("every token is ruled out")), openai.BadRequestError, "ruled out"),
        (Failed(ModelError("secret path")), openai.InternalServerError, "its log says why"),
        (ZeroDivisionError("secret"), openai.InternalServerError, "its log says why"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_have_their_status(scripted, capfd, error, kind, words, stream):
    _, _, client = scripted(error)
    with pytest.raises(kind, match=words) as caught:
        client.chat.completions.create(**ASKED, stream=stream)
    assert "secret" not in str(caught.value)
    log.flush()
    assert ("secret" in capfd.readouterr().err) == ("secret" in str(getattr(error, "error", error)))
    if kind is openai.RateLimitError:
        assert caught.value.response.headers["retry-after"] == "7"


def test_a_failure_within_a_stream_is_told_in_it(scripted):
    _, _, client = scripted(["\nHe", "llo", Failed(DeadlineError("late")), "never"])
    stream = client.chat.completions.create(**ASKED, stream=True)
    said = []
    with pytest.raises(openai.APIError, match="longer than this server allows"):
        said.extend(chunk.choices[0].delta.content for chunk in stream)
    assert "".join(said) == "Hello"


def test_of_several_replies_none_runs_on_when_one_fails(scripted):
    scheduler, _, client = scripted(["\na", None, "b"], QueueFullError("full", 1))
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**ASKED, n=2)
    assert scheduler.tickets[0].cancelled.is_set()


def asking(server, route, stream):
    """A connection that has sent a request."""
    path, asked = {
        "chat": ("/v1/chat/completions", {"messages": WHO}),
        "messages": ("/v1/messages", {"messages": WHO, "max_tokens": 9}),
        "responses": ("/v1/responses", {"input": WHO}),
        "text": ("/v1/completions", {"prompt": "x"}),
    }[route]
    body = json.dumps({"model": MODEL, "stream": stream} | asked)
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


def wait_until(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat", "messages", "responses", "text"])
def test_who_leaves_frees_the_slot(scripted, stream, route):
    scheduler, server, _ = scripted(["\nHe", "llo", None, "never"])
    with asking(server, route, stream) as connection:
        wait_until(lambda: scheduler.tickets)
        received = b""
        while stream and b"llo" not in received:
            received += connection.recv(65536)
        assert not scheduler.tickets[0].cancelled.is_set()
    assert scheduler.tickets[0].cancelled.wait(PATIENCE)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_the_prompt_is_encoded_gets_no_slot_for_long(scripted, monkeypatch, stream):
    scheduler, server, _ = scripted([None, "never"])
    encodes, go = threading.Event(), threading.Event()
    encode = ServedModel.encode

    def slow(*arguments):
        encodes.set()
        go.wait(PATIENCE)
        return encode(*arguments)

    monkeypatch.setattr(ServedModel, "encode", slow)
    with asking(server, "text", stream):
        assert encodes.wait(PATIENCE)
    go.set()
    wait_until(lambda: scheduler.tickets)
    assert scheduler.tickets[0].cancelled.wait(PATIENCE)


def test_what_a_request_asks_reaches_the_scheduler(scripted):
    scheduler, _, client = scripted(["x"])
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 4,
        "stop": "end",
        "max_tokens": 7,
        "logit_bias": {"5": -2},
    }
    options |= {"frequency_penalty": 0.1, "presence_penalty": 0.2, "logprobs": True, "top_logprobs": 2}
    more = {"top_k": 3, "min_p": 0.05, "repetition_penalty": 1.1, "stop_token_ids": [9], "ignore_eos": True}
    client.chat.completions.create(**ASKED, **options, extra_body=more)
    (request,) = scheduler.requests
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 3, 0.05)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (params.seed, params.stop, params.stop_token_ids, params.max_tokens) == (4, ("end",), (9,), 7)
    assert (dict(params.logit_bias), params.ignore_eos) == ({5: -2.0}, True)
    assert (request.logprobs, request.top_logprobs, request.mask) == (True, 2, None)
    assert request.deadline is not None


def test_the_checkpoint_recommends_what_is_left_open(demo_bundle, tmp_path, scripted):
    import json
    import shutil

    folder = shutil.copytree(demo_bundle, tmp_path / "recommended")
    text = json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 40})
    (folder / "generation_config.json").write_text(text)
    scheduler, _, client = scripted(["x"], ["x"], bundle=rehash(folder))
    client.chat.completions.create(model="recommended", messages=WHO)
    client.chat.completions.create(model="recommended", messages=WHO, temperature=0)
    found = [(r.params.temperature, r.params.top_p, r.params.top_k) for r in scheduler.requests]
    assert found == [(0.6, 0.95, 40), (0.0, 0.95, 40)]
