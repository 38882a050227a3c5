"""Bundles with templates of other kinds: the second form of calls, ends of turns, and code that never ends."""

import json
import shutil
import threading

import httpx
import numpy as np
import openai
import pytest

from glm4_runtime.bundle import file_entry
from glm4_runtime.server import log
from glm4_runtime.tokenizer import Tokenizer

MODEL = "glm4-tiny"
WHO = [{"role": "user", "content": "Who are you?"}]
ASKED = {"model": MODEL, "messages": WHO}
SEARCH = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
# What GLM-Z1-Rumination's template does, in words of our own.
RUMINATION = (
    '[gMASK]<sop><|system|>\nYou study, by [{"name": "search"}, {"name": "finish"}].'
    "{% for m in messages if m.role != 'system' %}{% if m.metadata %}<|assistant|>{{ m.metadata + ' \n' + m.content }}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)
ENDLESS = (
    "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}[gMASK]<sop><|user|>\n{{ messages[0].content }}<|assistant|>"
)


@pytest.fixture
def bundle_with(demo_bundle, tmp_path):
    """A function: the demo's bundle with another template, and with other end tokens."""

    def make(template=None, eos=None):
        folder = tmp_path / MODEL
        shutil.copytree(demo_bundle, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
            entry = file_entry(folder / "chat_template.jinja")
            manifest["files"]["chat_template.jinja"] = {"sha256": entry.sha256, "bytes": entry.bytes}
        if eos is not None:
            manifest["model"]["eos_token_ids"] = eos
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return make


def test_calls_of_the_second_form_are_tool_calls(scripted, bundle_with):
    said = ["so</th", 'ink>{"na', 'me": "search", "argu', 'ments": {"q": "}"', "}}"]
    _, _, client = scripted(said, bundle=bundle_with(RUMINATION))
    (choice,) = client.chat.completions.create(**ASKED, tools=SEARCH).choices
    message = choice.message
    assert choice.finish_reason == "tool_calls"
    assert message.reasoning_content == "so"
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == [("search", '{"q": "}"}')]
    assert not message.content


def test_a_forced_call_has_the_form_that_the_model_writes(scripted, bundle_with):
    folder = bundle_with(RUMINATION)
    scheduler, _, client = scripted(["x"], bundle=folder)
    client.chat.completions.create(**ASKED, tools=SEARCH, tool_choice="required")
    mask = scheduler.requests[0].mask
    tokenizer = Tokenizer.from_folder(folder)
    text = 'hm</think>\n{"name": "search", "arguments": {"q": 1}}'
    for token in tokenizer.encode(text, add_special_tokens=False):
        logits = np.zeros(2048, np.float32)
        mask.apply(logits)
        assert logits[token] == 0
        mask.advance(token)
    logits = np.zeros(2048, np.float32)
    mask.apply(logits)
    assert logits[2045] == 0  # it may end here


def test_what_the_template_drops_is_refused(scripted, bundle_with):
    _, _, client = scripted(bundle=bundle_with(RUMINATION))
    with pytest.raises(openai.BadRequestError, match="drops system messages"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "system", "content": "x"}, *WHO])
    other = [{"type": "function", "function": {"name": "get_time"}}]
    with pytest.raises(openai.BadRequestError, match="its own functions are: finish, search"):
        client.chat.completions.create(**ASKED, tools=other)


@pytest.mark.parametrize("ignore", [False, True])
def test_a_turn_ends_where_the_template_begins_the_next(scripted, bundle_with, ignore):
    scheduler, _, client = scripted(["x"], ["y"], bundle=bundle_with(eos=[2038]))
    client.chat.completions.create(**ASKED, extra_body={"stop_token_ids": [7], "ignore_eos": ignore})
    assert set(scheduler.requests[0].params.stop_token_ids) == ({7} if ignore else {7, 2045, 2047})
    client.completions.create(model=MODEL, prompt="x")
    assert scheduler.requests[1].params.stop_token_ids == ()


def test_end_tokens_that_the_model_names_are_not_named_twice(scripted):
    scheduler, _, client = scripted(["x"])
    client.chat.completions.create(**ASKED)
    assert scheduler.requests[0].params.stop_token_ids == ()


def test_text_that_names_control_tokens_is_plain_text(scripted, demo_bundle):
    scheduler, server, client = scripted(["x"])
    client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a<|endoftext|>[MASK]<|user|>\nb"}]
    )
    tokenizer = Tokenizer.from_folder(demo_bundle)
    ids = scheduler.requests[0].prompt_ids
    assert tokenizer.decode(ids) == "\na<|endoftext|>[MASK]<|user|>\nb"
    assert sum(token in tokenizer.special_ids for token in ids) == 4
    asked = {"messages": [{"role": "user", "content": "<|user|>"}]}
    found = httpx.post(f"{server.url}/tokenize", json=asked).json()["tokens"]
    assert [token for token in found if token in tokenizer.special_ids] == [2040, 2042, 2045, 2046]
    # a prompt for completions keeps its way
    found = httpx.post(f"{server.url}/tokenize", json={"prompt": "a<|user|>"}).json()["tokens"]
    assert 2045 in found


def test_a_template_that_never_ends_holds_up_nobody_else(server_of, bundle_with, capfd):
    statuses = []

    def ask():
        body = {"model": MODEL, "messages": [{"role": "user", "content": "loop"}], "max_tokens": 1}
        statuses.append(httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).status_code)

    with server_of(bundle_with(ENDLESS), request_timeout=3.0) as running:
        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            assert httpx.get(f"{running.url}/health", timeout=30).status_code == 200
            assert httpx.post(f"{running.url}/tokenize", json={"prompt": "x"}, timeout=30).status_code == 200
            body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
            assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=30).status_code == 200
        assert any(thread.is_alive() for thread in threads)
        for thread in threads:
            thread.join()
        assert statuses == [504] * 12
        body = {"model": MODEL, "messages": WHO, "max_tokens": 1}
        after = (httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=30) for _ in range(20))
        assert any(response.status_code == 200 for response in after)
    log.flush()
    assert '"traceback"' not in capfd.readouterr().err


def test_the_log_tells_what_the_template_drops(server_of, bundle_with, capfd):
    with server_of(bundle_with(RUMINATION, eos=[2038])):
        pass
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (told,) = [line for line in lines if line["event"] == "template"]
    assert told["level"] == "warning"
    assert told["drops"] == ["system messages", "tools"]
    assert told["also_ends_at"] == ["<|user|>", "<|observation|>"]
