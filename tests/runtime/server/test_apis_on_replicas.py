"""The Messages and Responses APIs in front of replicas: the same answers as in front of one session."""

import anthropic
import httpx
import openai
import pytest
from local_replicas import LocalReplica, joined

from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.serve import DescribedBundle
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving

MODEL = "glm4-tiny"
WHO = [{"role": "user", "content": "Who are you?"}]
ABOUT = "I am glm4-tiny, a very small model for demonstrations. I have read a few old books."
COLD = {"extra_body": {"temperature": 0}}


@pytest.fixture
def fleet_of():
    """A function that serves a bundle by two replicas; returns the server."""
    opened = []

    def serve(bundle):
        fleet = Fleet(max_queue=8)
        replicas = [joined(fleet, LocalReplica(name, bundle)) for name in "ab"]
        context = serving(DescribedBundle(bundle, {}), ServerOptions(port=0), fleet)
        opened.append((context, fleet, replicas))
        return context.__enter__()

    yield serve
    for context, fleet, replicas in opened:
        context.__exit__(None, None, None)
        fleet.stop(0)
        for replica in replicas:
            replica.close()


def test_both_apis_on_replicas(fleet_of, demo_bundle):
    server = fleet_of(demo_bundle)
    claude = anthropic.Anthropic(base_url=server.url, api_key="none", timeout=60)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60)
    with claude.messages.stream(model=MODEL, messages=WHO, max_tokens=60, **COLD) as stream:
        assert stream.get_final_text() == ABOUT
    cut = claude.messages.create(
        model=MODEL, messages=WHO, max_tokens=60, stop_sequences=["x", " model"], **COLD
    )
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", " model")
    first = client.responses.create(model=MODEL, input="Who are you?", temperature=0)
    second = client.responses.create(
        model=MODEL, input="Who are you?", previous_response_id=first.id, temperature=0
    )
    assert first.output_text == ABOUT
    assert second.usage.input_tokens > first.usage.total_tokens - 5


def test_a_budget_of_thinking_on_replicas(fleet_of, thinking_bundle):
    server = fleet_of(thinking_bundle)
    claude = anthropic.Anthropic(base_url=server.url, api_key="none", timeout=60)
    thinking = {"type": "enabled", "budget_tokens": 8}
    answer = claude.messages.create(model=MODEL, messages=WHO, max_tokens=60, thinking=thinking, **COLD)
    assert answer.usage.output_tokens_details.thinking_tokens == 8 + 6  # with the closing tag
    assert [block.type for block in answer.content] == ["thinking", "text"]


def test_masks_of_replicas_are_counted(fleet_of, demo_bundle):
    server = fleet_of(demo_bundle)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60)
    form = {"response_format": {"type": "json_object"}}
    answer = client.chat.completions.create(model=MODEL, messages=WHO, max_tokens=6, **form)
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    (count,) = [float(line.split()[1]) for line in lines if line.startswith("glm4_mask_seconds_count")]
    assert 0 < count <= answer.usage.completion_tokens
