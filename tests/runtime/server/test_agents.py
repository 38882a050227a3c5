"""Requests of real agents, with their long texts shortened: codex 0.171, opencode 1.18 and aider 0.86."""

import json
from pathlib import Path

import anthropic
import httpx
import pytest
from anthropic.types import RawMessageStreamEvent
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from sdk_types import events_of, strictly

from glm4_runtime.tokenizer import Tokenizer

AGENTS = sorted((Path(__file__).parents[2] / "data" / "agents").glob("*.json"))
EVENTS = {
    "/v1/chat/completions": ChatCompletionChunk,
    "/v1/messages": RawMessageStreamEvent,
    "/v1/responses": ResponseStreamEvent,
}
NAMES = ("claude-x=glm4-tiny",)


def asked(file):
    found = json.loads(file.read_text())
    return found["path"], found["body"]


@pytest.mark.parametrize("file", AGENTS, ids=lambda file: file.stem)
def test_a_request_of_an_agent_is_answered(scripted, demo_bundle, file):
    scheduler, server, _ = scripted(["\nI", " see."], aliases=NAMES)
    path, body = asked(file)
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    said = ""
    for _, data in events_of(answer):
        if data.get("type") != "ping":
            strictly(EVENTS[path], data)
        said += text_of(data)
    assert said == "I see."
    prompt = Tokenizer.from_folder(demo_bundle).decode(scheduler.requests[0].prompt_ids, False)
    for tool in body.get("tools", ()):
        assert f"## {tool['name']}\n" in prompt
    results = [kind for kind in ('"function_call_output"', '"tool_result"') if kind in json.dumps(body)]
    assert prompt.count("<|observation|>\n") == len(results)


def text_of(data):
    """The text that an event adds."""
    if "choices" in data:
        return "".join(choice["delta"].get("content") or "" for choice in data["choices"])
    delta = data.get("delta")
    return delta if isinstance(delta, str) else (delta or {}).get("text", "")


def test_the_clients_agree_about_one_question(scripted):
    """The same conversation by three APIs is one prompt."""
    scheduler, server, chat = scripted(["x"], ["x"], ["x"])
    claude = anthropic.Anthropic(base_url=server.url, api_key="none")
    question = [{"role": "user", "content": "Who are you?"}]
    chat.chat.completions.create(
        model="glm4-tiny", messages=[{"role": "system", "content": "Be brief."}, *question]
    )
    chat.responses.create(model="glm4-tiny", instructions="Be brief.", input="Who are you?")
    claude.messages.create(model="glm4-tiny", system="Be brief.", messages=question, max_tokens=5)
    first, *others = (request.prompt_ids for request in scheduler.requests)
    assert others == [first, first]
