"""Streams whose client reads slowly or not at all: little is held for them, none is cut, and slots are freed in time."""

import asyncio
import json
import socket
import time
from contextlib import closing

import httpx
import pytest

from glm4_runtime import SamplingParams
from glm4_runtime.generate import Token
from glm4_runtime.scheduler import Generated, Request
from glm4_runtime.server import served_model
from glm4_runtime.server.running_replies import RunningReplies
from glm4_runtime.server.unread import Unread, UnreadOfOne

MODEL = "glm4-tiny"
PATIENCE = 60  # seconds after which a test holds that nothing will happen any more


class NoFigures:
    """Metrics that nobody looks at."""

    class _Histogram:
        def observe(self, _value):
            """Nothing."""

    first_token_seconds = inter_token_seconds = _Histogram()


class ByHand:
    """A scheduler, and the ticket of its requests, that gives an event when the test says so."""

    def __init__(self):
        self.listeners, self.held, self.lagging = [], False, False

    def submit(self, _request, on_event):
        self.listeners.append(on_event)
        return self

    def cancel(self):
        """Nothing runs."""

    def hold(self):
        self.held = True

    def go_on(self):
        self.held = False

    def lag(self):
        self.lagging = True

    def catch_up(self):
        self.lagging = False

    def give(self, count=1, top=0, last=False):
        """``count`` tokens, in turn of the sequences."""
        for number in range(count):
            token = Token(5, "x", -0.5, "length" if last else None)
            self.listeners[number % len(self.listeners)](Generated(token, ((1, -0.5),) * top))


def job_of(scheduler, unread, count=1, blocked=lambda: False):
    requests = [Request((1, 2), SamplingParams())] * count
    return RunningReplies(scheduler, requests, NoFigures(), UnreadOfOne(unread, blocked))


@pytest.mark.parametrize(("top", "fit"), [(0, 100), (3, 25), (20, 4)])
def test_generation_is_held_while_much_is_unread_and_goes_on_when_half_is_read(top, fit):
    async def run():
        scheduler = ByHand()
        events = job_of(scheduler, Unread(100, 100)).events()
        scheduler.give(fit, top)
        assert not scheduler.held
        scheduler.give(1, top)
        assert scheduler.held
        read = 0
        while scheduler.held:
            await anext(events)
            read += 1
        assert 1 + fit // 2 <= read <= 1 + (fit + 1) // 2
        scheduler.give(1, top, last=True)
        async for _ in events:
            read += 1
        assert read == fit + 2  # nothing is lost

    asyncio.run(run())


def test_the_sequences_of_a_request_share_what_may_be_unread():
    async def run():
        scheduler = ByHand()
        job_of(scheduler, Unread(100, 100), count=2)
        scheduler.give(100)
        assert not scheduler.held
        scheduler.give()
        assert scheduler.held

    asyncio.run(run())


def test_only_those_with_much_unread_are_held_and_only_while_there_is_too_much():
    async def run():
        unread = Unread(most=100, few=10)
        slow, quick, left = ByHand(), ByHand(), ByHand()
        job_of(slow, unread)
        events = job_of(quick, unread).events()
        gone = job_of(left, unread)
        left.give(60)
        slow.give(40)
        assert not slow.held
        quick.give(5)
        slow.give()
        assert (slow.held, quick.held, left.held) == (True, False, False)
        for _ in range(5):
            await anext(events)
        assert slow.held
        gone.close()  # its client has left
        assert not slow.held
        assert unread.put - unread.taken == 41
        gone.close()
        assert unread.put - unread.taken == 41

    asyncio.run(run())


@pytest.mark.parametrize(("top", "fit"), [(0, 32), (3, 8), (20, 1)])
def test_a_client_lags_while_its_connection_is_full_and_tokens_are_unread(top, fit):
    async def run():
        scheduler, full = ByHand(), [True]
        events = job_of(scheduler, Unread(), blocked=lambda: full[0]).events()
        scheduler.give(fit, top)
        assert not scheduler.lagging
        scheduler.give(1, top)
        assert scheduler.lagging
        for _ in range(fit // 2):
            await anext(events)
        assert scheduler.lagging
        for _ in range(fit - fit // 2 + 1):
            await anext(events)
        assert not scheduler.lagging
        full[0] = False  # however much is unread: it is the server that is late
        scheduler.give(100, top)
        assert not scheduler.lagging

    asyncio.run(run())


def unread_stream(server, **options):
    """A connection that asks for a stream and does not read."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((host, int(port)))
    body = json.dumps({"model": MODEL, "prompt": "x", "stream": True, "ignore_eos": True} | options).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def with_small_buffers(server):
    """Connections of this server have the system hold little of what is unread."""
    server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return server


def metric(server, name):
    lines = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


def at_rest(server, ticket):
    """Whether a request is held, and was so for a while."""
    before = metric(server, "glm4_generated_tokens_total")
    time.sleep(0.3)
    return ticket.held and metric(server, "glm4_generated_tokens_total") == before


def wait_until(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def tickets(monkeypatch):
    """Few tokens may be unread. The tickets of all requests that the servers of this test take."""
    monkeypatch.setattr(served_model, "Unread", lambda: Unread(100, 100))
    found = []
    submit = served_model.Scheduler.submit

    def noting(scheduler, request, on_event):
        found.append(submit(scheduler, request, on_event))
        return found[-1]

    monkeypatch.setattr(served_model.Scheduler, "submit", noting)
    return found


def test_a_client_that_reads_late_gets_all_of_its_answer(demo_bundle, server_of, tickets):
    with (
        server_of(demo_bundle) as server,
        closing(unread_stream(with_small_buffers(server), max_tokens=1900, logprobs=5)) as stream,
    ):
        wait_until(lambda: tickets and at_rest(server, tickets[0]))
        assert metric(server, "glm4_generated_tokens_total") < 1900
        stream.settimeout(PATIENCE)
        answer = b"".join(iter(lambda: stream.recv(65536), b""))
        assert answer.count(b'"finish_reason": "length"') + answer.count(b'"finish_reason":"length"') == 1
        assert b"[DONE]" in answer
        assert metric(server, "glm4_generated_tokens_total") == 1900


def test_the_deadline_frees_the_slots_of_streams_that_nobody_reads(demo_bundle, server_of, tickets):
    """Six streams over four slots: the waiting ones end, too, and the next request is served."""
    with server_of(demo_bundle, request_timeout=2.0) as server:
        with_small_buffers(server)
        streams = [unread_stream(server, max_tokens=1900, logprobs=5) for _ in range(6)]
        wait_until(lambda: sum(ticket.held for ticket in tickets) == 4)
        wait_until(lambda: metric(server, "glm4_active_slots") == 0)
        assert metric(server, 'glm4_sequences_total{outcome="timeout"}') == 6
        asked = {"model": MODEL, "prompt": "x", "max_tokens": 2}
        answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=PATIENCE)
        assert answer.status_code == 200
        for stream in streams:
            stream.close()


def test_streams_that_nobody_reads_leave_their_slots_to_others(demo_bundle, server_of):
    """Twelve over four slots. Half of them read after all, and get the whole answer."""
    with server_of(demo_bundle, request_timeout=PATIENCE) as server:
        with_small_buffers(server)
        streams = [unread_stream(server, max_tokens=300, logprobs=5) for _ in range(12)]
        wait_until(lambda: metric(server, "glm4_parked_requests") == 8)
        asked = {"model": MODEL, "prompt": "x", "max_tokens": 4}
        for _ in range(5):
            answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=PATIENCE)
            assert answer.status_code == 200
        assert (
            9 <= metric(server, "glm4_preemptions_total") <= 13
        )  # nobody's tokens are computed again and again
        # where the machine is slow, the four streams that nobody waits for may end by themselves
        assert 5 <= metric(server, 'glm4_sequences_total{outcome="length"}') <= 9
        for stream in streams[::2]:
            stream.settimeout(PATIENCE)
            answer = b"".join(iter(lambda stream=stream: stream.recv(65536), b""))
            assert answer.replace(b" ", b"").count(b'"finish_reason":"length"') == 1
            assert b"[DONE]" in answer
        assert metric(server, "glm4_recomputed_tokens_total") > 0
        for stream in streams:
            stream.close()


def test_the_system_keeps_little_of_an_unread_answer(demo_bundle, server_of, tickets):
    """With the system's own sizes of buffers at the server, and few bytes at the client."""
    with server_of(demo_bundle) as server, closing(unread_stream(server, max_tokens=1900)):
        wait_until(lambda: tickets and tickets[0].lagging)
        assert metric(server, "glm4_generated_tokens_total") < 900
