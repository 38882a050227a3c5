"""Bodies made up from the server's own OpenAPI document: none may end in a 500."""

import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from glm4_runtime.server import log
from glm4_runtime.server.options import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.session import Session


@pytest.fixture(scope="module")
def document(demo_bundle):
    """The server's description of itself, and the server."""
    # short answers whatever is asked: what counts is what is done with the question
    options = ServerOptions(port=0, request_timeout=0.1, max_prompt_tokens=200, allow_lora_loading=True)
    with serving(Session.open(demo_bundle), options) as server:
        yield httpx.get(f"{server.url}/openapi.json").json(), server.url


def test_every_operation_is_documented(document):
    found = {(method, path) for path, item in document[0]["paths"].items() for method in item}
    assert found == {
        ("post", "/v1/chat/completions"), ("post", "/v1/completions"), ("post", "/v1/embeddings"),
        ("post", "/v1/classify"), ("get", "/v1/models"), ("get", "/v1/models/{name}"), ("post", "/tokenize"),
        ("post", "/detokenize"), ("get", "/health"), ("get", "/health/live"), ("get", "/health/ready"),
        ("post", "/v1/responses"), ("get", "/v1/responses/{response_id}"), ("delete", "/v1/responses/{response_id}"),
        ("post", "/v1/responses/{response_id}/cancel"), ("get", "/metrics"), ("post", "/v1/messages"), ("post", "/v1/messages/count_tokens"),
        ("post", "/v1/load_lora_adapter"), ("post", "/v1/unload_lora_adapter"),
    }  # fmt: skip
    for item in document[0]["paths"].values():
        for operation in item.values():
            assert "422" not in operation["responses"]
            assert {"200", "400", "429", "503"} <= set(operation["responses"])


OPERATIONS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/classify",
    "/tokenize",
    "/detokenize",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
]


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", OPERATIONS)
def test_no_body_ends_in_a_500(document, path, mode):
    description, url = document
    operation = schemathesis.openapi.from_dict(description)[path]["post"]
    seen = set()

    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def check(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "glm4-tiny"  # else all end at the first check
        response = case.call(base_url=url, timeout=30)
        seen.add(response.status_code)
        assert response.status_code in (200, 400, 404, 413, 503, 504), response.text
        if response.status_code != 200:
            assert (
                {"message", "type"} <= set(response.json()["error"]) <= {"message", "type", "param", "code"}
            )

    check()
    assert 400 in seen or mode is GenerationMode.POSITIVE


CONVERSATION = {
    "model": "glm4-tiny",
    "system": [{"type": "text", "text": "x"}],
    "messages": [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "a"},
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "9"}]},
                {"type": "text", "text": "so?"},
            ],
        },
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": {"properties": {"a": {"type": "integer"}}}}],
    "tool_choice": {"type": "tool", "name": "f"},
    "thinking": {"type": "disabled"},
}

BODIES = {
    "/v1/responses": {
        "model": "glm4-tiny",
        "instructions": "x",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
            {"type": "reasoning", "id": "r1", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "9"},
        ],
        "tools": [
            {"type": "function", "name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}
        ],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {
            "format": {"type": "json_schema", "name": "n", "schema": {"properties": {"a": {"enum": ["b"]}}}}
        },
        "metadata": {"a": "b"},
        "max_output_tokens": 1,
        "user": "u",
    },
    "/v1/messages/count_tokens": CONVERSATION,
    "/v1/messages": CONVERSATION
    | {
        "max_tokens": 1,
        "stop_sequences": ["x"],
        "metadata": {"user_id": "u"},
        "output_config": {
            "format": {"type": "json_schema", "schema": {"properties": {"a": {"enum": ["b"]}}}}
        },
    },
    "/v1/chat/completions": {
        "model": "glm4-tiny",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "9"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "description": "d",
                    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
                },
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "stream_options": {"include_usage": True},
        "metadata": {},
        "user": "u",
        "max_tokens": 1,
    },
    "/v1/completions": {
        "model": "glm4-tiny",
        "prompt": ["a"],
        "max_tokens": 1,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object", "properties": {"a": {"enum": ["b"]}}}},
        },
    },
    "/v1/embeddings": {"model": "glm4-tiny", "input": ["x"], "encoding_format": "float"},
    "/v1/classify": {"model": "glm4-tiny", "input": ["x"]},
    "/tokenize": {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True},
    "/detokenize": {"tokens": [1, 2], "skip_special_tokens": False},
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "nowhere"},
    "/v1/unload_lora_adapter": {"lora_name": "x"},
}


def with_half_pairs(value):
    """Copies of a JSON value, each with half a surrogate pair in one place: as a value, in a text, as a name."""
    if isinstance(value, dict):
        yield {**value, "\ud800": 1}
        for name, inner in value.items():
            yield {("\udfff" + key if key == name else key): other for key, other in value.items()}
            yield from ({**value, name: changed} for changed in with_half_pairs(inner))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from ([*value[:index], changed, *value[index + 1 :]] for changed in with_half_pairs(inner))
    else:
        yield f"{value}\ud800"


@pytest.mark.parametrize("path", OPERATIONS)
def test_half_a_surrogate_pair_anywhere_is_no_defect(document, path, capfd):
    """JSON may hold one, escaped; UTF-8 may not."""
    tried = 0
    with httpx.Client(base_url=document[1], timeout=60) as client:
        for body in with_half_pairs(BODIES[path]):
            sent = json.dumps(body)
            answer = client.post(path, content=sent, headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, 400, 404, 504), (sent, answer.text)
            if answer.status_code != 200:
                assert len(answer.json()["error"]["message"]) <= 500
            tried += 1
    assert tried > len(BODIES[path])
    log.flush()
    assert "defect" not in capfd.readouterr().err
