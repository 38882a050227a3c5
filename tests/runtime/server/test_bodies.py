"""How the bodies of requests share memory and time."""

import asyncio
import itertools
import time

import pytest

from glm4_runtime.server import bodies
from glm4_runtime.server.bodies import SMALL, Bodies
from glm4_runtime.server.errors import ApiError
from glm4_runtime.server.running_replies import ClientGoneError

LARGE = 2 * SMALL


def pieces(*parts, then=None):
    """A ``receive`` that hands out these parts; after them it does what ``then`` says: wait, end or leave."""
    left = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if then is None:
        left[-1]["more_body"] = False

    async def receive():
        if left:
            return left.pop(0)
        if then == "leave":
            return {"type": "http.disconnect"}
        await asyncio.sleep(3600)
        raise AssertionError

    return receive


def read(store, receive, length=None):
    async def whole():
        async with store.reading(length, receive) as body:
            return body

    return whole()


def test_a_body_is_put_together():
    store = Bodies(longest=100, timeout=1, silence=1)
    assert asyncio.run(read(store, pieces(b"a", b"", b"bc"))) == b"abc"
    assert store.held == 0


@pytest.mark.parametrize("length", [None, 101, 50])
def test_a_long_body_is_refused(length):
    store = Bodies(longest=100, timeout=1, silence=1)
    with pytest.raises(ApiError, match="longer than the 100 bytes") as refused:
        asyncio.run(read(store, pieces(b"x" * 60, b"x" * 60, then="wait"), length))
    assert refused.value.status == 413


@pytest.mark.parametrize(("timeout", "silence"), [(0.1, 9), (9, 0.1)])
def test_a_slow_body_is_refused(timeout, silence):
    store = Bodies(longest=LARGE, timeout=timeout, silence=silence)
    with pytest.raises(ApiError) as refused:
        asyncio.run(read(store, pieces(b"x" * (SMALL + 1), then="wait")))
    assert refused.value.status == 408
    assert store.held == 0


def test_a_client_that_leaves_gives_its_room_back():
    store = Bodies(longest=LARGE, timeout=1, silence=1)
    with pytest.raises(ClientGoneError):
        asyncio.run(read(store, pieces(b"x" * (SMALL + 1), then="leave")))
    assert store.held == 0


def test_a_body_holds_its_room_until_the_request_is_over():
    async def main():
        store = Bodies(longest=LARGE, timeout=1, silence=1)
        async with store.reading(LARGE, pieces(b"x" * LARGE)) as body:
            assert len(body) == store.held == LARGE
        assert store.held == 0
        async with store.reading(SMALL, pieces(b"x" * SMALL)):
            assert store.held == 0  # a small one is free
        async with store.reading(None, pieces(b"x" * (SMALL + 1))):
            assert store.held == LARGE  # in chunks it may become as long as any

    asyncio.run(main())


def test_a_small_body_is_read_while_large_ones_wait(monkeypatch):
    monkeypatch.setattr(bodies, "_PATIENCE", 3600)

    async def main():
        store = Bodies(longest=LARGE, timeout=30, silence=30, budget=0)  # room for four
        unfinished = pieces(b"x" * (SMALL + 1), then="wait")
        waiting = [
            asyncio.create_task(read(store, pieces(b"x" * (SMALL + 1), then="wait"))) for _ in range(9)
        ]
        await asyncio.sleep(0.1)
        assert store.held == 4 * LARGE
        assert await asyncio.wait_for(read(store, pieces(b"small")), 1) == b"small"
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert store.held == 0
        assert unfinished is not None

    asyncio.run(main())


def test_bodies_that_arrive_slowly_make_room_for_new_ones(monkeypatch):
    monkeypatch.setattr(bodies, "_PATIENCE", 0.1)

    async def main():
        store = Bodies(longest=LARGE, timeout=30, silence=30, budget=0)
        slow = [asyncio.create_task(read(store, pieces(b"x" * (SMALL + 1), then="wait"))) for _ in range(4)]
        await asyncio.sleep(0.05)
        assert len(await asyncio.wait_for(read(store, pieces(b"x" * LARGE), LARGE), 5)) == LARGE
        with pytest.raises(ApiError) as refused:
            await slow[0]
        assert refused.value.status == 408
        assert not slow[3].done()
        for task in slow[1:]:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    asyncio.run(main())


def test_too_many_large_bodies_are_told_to_come_back(monkeypatch):
    monkeypatch.setattr(bodies, "_PATIENCE", 3600)
    monkeypatch.setattr(bodies, "_MOST_WAITING", 2)

    async def main():
        store = Bodies(longest=LARGE, timeout=30, silence=30, budget=0)
        tasks = [asyncio.create_task(read(store, pieces(b"x" * (SMALL + 1), then="wait"))) for _ in range(7)]
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=5)
        refused = [task.exception() for task in done]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        assert {(error.status, error.body["error"]["code"]) for error in refused} == {(503, "overloaded")}
        assert refused[0].headers["Retry-After"] == "1"

    asyncio.run(main())


@pytest.mark.alone
def test_large_bodies_are_parsed_one_at_a_time_with_a_pause_between():
    """While three bodies are worked on for 60 ms each, a small task gets its turns in between."""

    async def main():
        store = Bodies(longest=LARGE, timeout=30, silence=30)
        spans, worst, last = [], 0.0, time.perf_counter()

        async def parse():
            async with store.reading(LARGE, pieces(b"x" * LARGE)):
                began = time.perf_counter()
                time.sleep(0.06)  # what json.loads does with the event loop
                spans.append((began, time.perf_counter()))
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(parse()) for _ in range(3)]
        turns = 0
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            now = time.perf_counter()
            worst, last, turns = max(worst, now - last), now, turns + 1
        assert turns > 20
        pauses = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
        assert len(pauses) == 2
        assert min(pauses) >= 0.055

    asyncio.run(main())
