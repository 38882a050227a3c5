"""What is refused, and how: a 4xx in OpenAI's shape that names the option, before any token is generated."""

import gzip
import json
import time

import httpx
import openai
import pytest

MODEL = "glm4-tiny"
WHO = [{"role": "user", "content": "Who are you?"}]
TOOL = {"type": "function", "function": {"name": "get_time"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.fixture(scope="module")
def post(server):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield lambda path, **options: http.post(
            path, **{"headers": {"Content-Type": "application/json"}} | options
        )


def refused(response, status=400):
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "Traceback" not in response.text
    return error


CHAT = [
    # not implemented, by name
    ({"audio": {"voice": "x"}}, "audio", "audio is not implemented"),
    ({"modalities": ["text", "audio"]}, "modalities", "not implemented"),
    ({"store": True}, "store", "not implemented"),
    ({"metadata": {"a": "b"}}, "metadata", "not implemented"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction", "not implemented"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "does not think"),
    ({"service_tier": "flex"}, "service_tier", "not implemented"),
    ({"web_search_options": {}}, "web_search_options", "not implemented"),
    ({"functions": [{"name": "f"}]}, "functions", "not implemented"),
    ({"function_call": "auto"}, "function_call", "not implemented"),
    ({"verbosity": "low"}, "verbosity", "not implemented"),
    # unknown
    ({"temprature": 1}, "temprature", "no such option"),
    ({"suffix": "x"}, "suffix", "no such option"),
    ({"best_of": 2}, "best_of", "no such option"),
    ({"echo": True}, "echo", "no such option"),
    ({"stream": True, "stream_options": {"include_usage": True, "x": 1}}, "stream_options.x", "no such option"),
    # of another type
    ({"temperature": "1"}, "temperature", "number"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": True}, "max_tokens", "integer"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "list"),
    ({"messages": [{"role": "user"}]}, "messages[0]", "needs content"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role", "'system'"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0]", "neither tool_calls"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "tool_call_id"),
    ({"stop": [""]}, "stop[0]", "at least 1 character"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
    ({"tool_choice": "maybe", "tools": [TOOL]}, None, "'required'"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "function"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name", "pattern"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    # outside its range, or against another option
    ({"temperature": -1}, None, "temperature"),
    ({"top_p": 0}, None, "top_p"),
    ({"frequency_penalty": 3}, None, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "no id"),
    ({"logit_bias": {"999999": 1}}, None, "999999"),
    ({"logit_bias": {"5": 101}}, None, "between -100 and 100"),
    ({"stop_token_ids": [999999]}, None, "999999"),
    ({"n": 17}, "n", "gives 16"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "give one"),
    ({"stream_options": {"include_timings": True}}, "stream_options", "include_timings goes with stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream"),
    ({"top_logprobs": 2}, "top_logprobs", "goes with logprobs"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [TOOL]}, "tool_choice", "get_time"),
    ({"tools": [TOOL, TOOL]}, "tools", "same name"),
    # what the model's format cannot say
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None, "text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "Unicode"),
    ({"messages": [{"role": "user", "content": "x " * 3000}]}, None, "this server takes 2048"),
    ({"messages": [*WHO, CALLED]}, None, "no message answers: call_1"),
    ({"messages": [*WHO, {"role": "tool", "tool_call_id": "a", "content": "x"}]}, None, "does not follow"),
    ({"messages": [*WHO, CALLED, {"role": "tool", "tool_call_id": "b", "content": "x"}]}, None, "not open"),
    # forms that cannot be enforced
    ({"response_format": {"type": "regex", "regex": "["}}, None, "unclosed"),
    ({"response_format": {"type": "regex", "regex": "((a?){500}a{500})"}}, None, "cannot be followed"),
    ({"response_format": {"type": "grammar", "grammar": "start: nothing"}}, None, "cannot be enforced"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "q"}}}}, None, "q"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, None, "not"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "http://x/y"}}}],
      "tool_choice": "required"}, None, "cannot be enforced"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "param", "words"), CHAT)
def test_a_chat_option_is_refused(post, options, param, words):
    error = refused(post("/v1/chat/completions", content=_json({"model": MODEL, "messages": WHO} | options)))
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"].startswith(param)


def _json(body):
    """The body with half surrogate pairs escaped, as only a hand-made request has them."""
    return json.dumps(body).encode()


@pytest.mark.parametrize("depth", [150, 400, 2000])
def test_deep_schemas_are_no_crash(post, depth):
    schema = '{"properties":{"x":' * depth + "{}" + "}}" * depth
    form = f'{{"type":"json_schema","json_schema":{{"name":"x","schema":{schema}}}}}'
    body = f'{{"model":"{MODEL}","messages":[{{"role":"user","content":"x"}}],"response_format":{form}}}'
    refused(post("/v1/chat/completions", content=body.encode()))


COMPLETIONS = [
    ({"suffix": "x"}, "suffix is not implemented"),
    ({"best_of": 2}, "best_of is not implemented"),
    ({"echo": True, "logprobs": 1, "stream": True}, "log-probabilities of a prompt are not streamed"),
    ({"prompt_logprobs": 1, "stream": True}, "log-probabilities of a prompt are not streamed"),
    ({"prompt_logprobs": 21}, "less than or equal to 20"),
    ({"max_tokens": -1}, "greater than or equal to 0"),
    ({"messages": WHO}, "no such option"),
    ({"prompt": []}, "at least 1"),
    ({"prompt": [5000]}, "5000"),
    ({"prompt": [-1]}, "greater than or equal to 0"),
    ({"prompt": ["a"] * 17}, "gives 16"),
    ({"prompt": None}, ""),
    ({"logprobs": 21}, "less than or equal to 20"),
]


@pytest.mark.parametrize(("options", "words"), COMPLETIONS)
def test_a_completion_option_is_refused(post, options, words):
    assert (
        words in refused(post("/v1/completions", json={"model": MODEL, "prompt": "x"} | options))["message"]
    )


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "x", "messages": WHO}, "either prompt or messages"),
        ("/tokenize", {"prompt": "x", "tools": [TOOL]}, "go with messages"),
        ("/tokenize", {"messages": WHO, "add_special_tokens": True}, "goes with prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "Unicode"),
        ("/detokenize", {"tokens": []}, "at least 1"),
        ("/detokenize", {"tokens": [2048]}, "0 to 2047"),
        ("/v1/embeddings", {"model": MODEL, "input": "x"}, "needs encoder"),
        ("/v1/embeddings", {"model": MODEL, "input": "x", "dimensions": 8}, "dimensions is not implemented"),
        ("/v1/classify", {"model": MODEL, "input": "x"}, "needs sequence-classification"),
    ],
)
def test_other_routes_refuse(post, path, body, words):
    assert words in refused(post(path, content=_json(body)))["message"]


def test_options_that_ask_for_nothing_are_taken(post):
    neutral = {
        "store": False,
        "modalities": ["text"],
        "service_tier": "auto",
        "metadata": None,
        "audio": None,
    }
    neutral |= {
        "tools": None,
        "stop": None,
        "n": None,
        "logit_bias": None,
        "response_format": {"type": "text"},
    }
    body = {"model": MODEL, "messages": WHO, "max_tokens": 1, "user": "somebody"} | neutral
    assert post("/v1/chat/completions", json=body).status_code == 200
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1, "suffix": None, "best_of": 1}
    assert post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_another_model_is_not_found(post, path):
    error = refused(post(path, json=_body(path)), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def _body(path):
    return {"model": "gpt-4"} | ({"messages": WHO} if "chat" in path else {"prompt": "x"})


@pytest.mark.parametrize(
    ("content", "type_"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[1]", "application/json"),
        (b"\xff", "application/json"),
        (b'{"model": "glm4-tiny"', "application/json"),
        (b"[" * 100_000, "application/json"),
        (
            b'{"model": "glm4-tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            "application/json",
        ),
        # what a form on a web page elsewhere could send
        (b'{"model": "glm4-tiny", "messages": [{"role": "user", "content": "x"}]}', "text/plain"),
    ],
)
def test_what_is_no_json_object_is_refused(post, content, type_):
    refused(post("/v1/chat/completions", content=content, headers={"Content-Type": type_}))


def test_routes_and_methods(server):
    refused(httpx.get(f"{server.url}/v1/nothing"), 404)
    refused(httpx.post(f"{server.url}/v1/models", json={}), 405)
    refused(httpx.get(f"{server.url}/docs"), 404)
    refused(httpx.get(f"{server.url}/static/../../etc/passwd"), 404)


def test_the_client_sees_its_own_exceptions(client):
    with pytest.raises(openai.BadRequestError, match="no such option"):
        client.chat.completions.create(model=MODEL, messages=WHO, extra_body={"guided_json": {}})
    with pytest.raises(openai.NotFoundError, match="no model 'x'"):
        client.chat.completions.create(model="x", messages=WHO)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("/v1/completions", {"prompt": [{}] * 300_000}),
        ("/v1/completions", {"prompt": "x", "stop_token_ids": ["a"] * 300_000}),
        ("/v1/chat/completions", {"messages": [{}] * 300_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 300_000}]}),
    ],
)
@pytest.mark.alone
def test_a_list_of_wrong_members_is_not_read_to_its_end(post, path, wrong):
    """One error is told; a million would block the event loop for as long as it takes to write them down."""
    start = time.perf_counter()
    refused(post(path, json={"model": MODEL} | wrong))
    assert time.perf_counter() - start < 2


def test_biases_are_bounded(post):
    bias = {str(token): 1.0 for token in range(1025)}
    assert (
        refused(post("/v1/completions", json={"model": MODEL, "prompt": "x", "logit_bias": bias}))["param"]
        == "logit_bias"
    )


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("temprature", "; did you mean temperature?"),
        ("topp", "; did you mean top_p?"),
        ("max_new_tokens", "; use max_tokens"),
        ("guided_json", "; use response_format of type json_schema"),
        ("stop_sequences", "; use stop"),
        ("prompt", "; POST a prompt to /v1/completions"),
        ("xyzzy", ""),
        ("x" * 1000, ""),
    ],
)
def test_an_unknown_option_is_answered_with_the_known_one(post, option, hint):
    error = refused(post("/v1/chat/completions", json={"model": MODEL, "messages": WHO, option: 1}))
    assert error["message"] == f"{option[:200]}: there is no such option{hint}"


@pytest.mark.parametrize(
    ("content", "headers", "words"),
    [
        # what curl -d sends of itself
        (
            b"{}",
            {"Content-Type": "application/x-www-form-urlencoded"},
            "its Content-Type is 'application/x-www-form-",
        ),
        (b"{}", {"Content-Type": ""}, "it has no Content-Type"),
        (b"{}", {"Content-Type": "text/plain"}, "(curl: -H 'Content-Type: application/json')"),
        (b"", {}, "the body is empty; send a JSON object"),
        (b"[1]", {}, "the body is JSON, but no object"),
        (b'"x"', {}, "the body is JSON, but no object"),
        (
            b"{'model': 1}",
            {},
            "the body is not JSON: Expecting property name enclosed in double quotes at character 1",
        ),
    ],
)
def test_a_body_that_cannot_be_read_says_what_to_send(post, content, headers, words):
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        error = refused(post(path, content=content, headers={"Content-Type": "application/json"} | headers))
        assert words in error["message"]
        assert "Content-Type: application/json" in error["message"]


@pytest.mark.parametrize(
    ("content", "headers", "words"),
    [
        (
            gzip.compress(b"{}", mtime=0),
            {"Content-Encoding": "gzip"},
            "has the Content-Encoding 'gzip'; send it without",
        ),
        (b'{"a":' + b"[" * 100_000, {}, "nested too deeply"),
        (b'{"a":' + b"9" * 10_000 + b"}", {}, "thousands of digits"),
        (b'{"a": "\xff"}', {}, "not UTF-8"),
    ],
)
def test_a_body_beyond_what_json_allows_says_why(post, content, headers, words):
    answer = post("/tokenize", content=content, headers={"Content-Type": "application/json"} | headers)
    assert words in refused(answer)["message"]
