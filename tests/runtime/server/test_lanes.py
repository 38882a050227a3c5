"""Threads beside the event loop, and what is refused before any of them works on it."""

import asyncio
import threading
import time

import httpx
import pytest

from glm4_runtime.server import lanes, log
from glm4_runtime.server.lanes import Lanes
from glm4_runtime.tokenizer import Tokenizer

MODEL = "glm4-tiny"


def test_quick_work_does_not_wait_for_slow_work():
    async def main():
        threads, free = Lanes(), threading.Event()
        slow = [asyncio.create_task(threads.run(free.wait, slow=True)) for _ in range(20)]
        assert await asyncio.wait_for(threads.run(lambda: 1), 5) == 1
        lanes.note_body(10**6)  # the work of a large body is slow, too
        waiting = asyncio.create_task(threads.run(lambda: 2))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        free.set()
        assert await waiting == 2
        await asyncio.gather(*slow)
        threads.close()

    asyncio.run(main())


def test_work_on_a_thread_has_the_record_of_its_request():
    async def main():
        threads, fields = Lanes(), log.begin("id")
        await threads.run(lambda: log.record().update(seen=True))
        assert fields["seen"]
        threads.close()

    asyncio.run(main())


def test_a_text_that_is_certainly_too_long_is_not_encoded(scripted, monkeypatch):
    _, server, _ = scripted()
    encoded = []
    real = Tokenizer.encode

    def encode(self, text, *more):
        encoded.append(len(text))
        return real(self, text, *more)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    long = "a" * 3_900_000
    for path, body in (
        ("/v1/completions", {"prompt": long}),
        ("/v1/completions", {"prompt": ["x", long]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
    ):
        refused = httpx.post(server.url + path, json={"model": MODEL} | body, timeout=30)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert "the prompt has at least 2" in refused.json()["error"]["message"]
    assert max(encoded, default=0) < 100


def test_many_ids_are_listed_in_pieces(scripted):
    _, server, _ = scripted()
    text = "1" * 30_001
    found = httpx.post(
        f"{server.url}/tokenize", json={"prompt": text, "add_special_tokens": False}, timeout=30
    )
    body = found.json()
    assert body["count"] == len(body["tokens"]) == 30_001
    assert (body["max_model_len"], len(set(body["tokens"]))) == (2048, 1)
    assert found.headers["content-type"] == "application/json"


@pytest.mark.alone
def test_a_health_probe_is_answered_while_a_long_text_is_encoded(scripted):
    """The tokenizer works for a second or two here; a probe takes a hundredth of that."""
    _, server, _ = scripted()
    done = threading.Event()

    def tokenize():
        httpx.post(f"{server.url}/tokenize", json={"prompt": "a" * 1_000_000}, timeout=60)
        done.set()

    thread = threading.Thread(target=tokenize)
    thread.start()
    times = []
    while not done.is_set():
        began = time.perf_counter()
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        times.append(time.perf_counter() - began)
    thread.join()
    assert len(times) > 5  # one alone, where encoding stops all else
