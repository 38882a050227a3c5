"""Clients that are too many, too slow or silent: each is ended, and the others are served meanwhile."""

import contextlib
import http.client
import socket
import time

import httpx
import pytest

from glm4_runtime.server import connections, run

MODEL = "glm4-tiny"
HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: "
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def connect():
    """A function that opens a connection to a server and sends bytes."""
    with contextlib.ExitStack() as stack:

        def open_one(server, data=b"", **options):
            host, port = server.url.removeprefix("http://").split(":")
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            for name, value in options.items():
                connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
            connection.sendall(data)
            return connection

        yield open_one


def ended(connection):
    """Whether the server ends the connection, and what it sent before."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False, received
    return True, received


def healthy(server):
    began = time.perf_counter()
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
    return time.perf_counter() - began


@pytest.mark.parametrize("data", [b"", HALF], ids=["silent", "half a header"])
def test_connections_without_a_request_make_room_for_others(scripted, connect, monkeypatch, data):
    monkeypatch.setattr(run, "_MOST_CONNECTIONS", 20)
    _, server, _ = scripted(header_timeout=60)
    held = [connect(server, data) for _ in range(30)]
    for _ in range(5):
        healthy(server)
    # the oldest went first; the last ones, which probes did not push out, are still there
    assert ended(held[0])[0]
    held[-1].settimeout(0.2)
    assert not ended(held[-1])[0]
    assert 'glm4_connections_ended_total{limit="evicted"}' in httpx.get(f"{server.url}/metrics").text


def test_a_request_that_runs_is_not_ended_for_others(scripted, connect, monkeypatch):
    monkeypatch.setattr(run, "_MOST_CONNECTIONS", 10)
    scheduler, server, client = scripted(["\na", None, "b"])
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    stream = client.chat.completions.create(**asked, stream=True)
    next(stream)
    held = [connect(server) for _ in range(30)]
    healthy(server)
    scheduler.go.set()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "ab"
    assert len(held) == 30


@pytest.mark.parametrize(
    "data", [b"", HALF, WHOLE + HALF], ids=["silent", "half a header", "a whole request and half a header"]
)
@pytest.mark.alone
def test_a_header_has_its_time(scripted, connect, data):
    _, server, _ = scripted(header_timeout=0.3, idle_timeout=60)
    began = time.monotonic()
    over, received = ended(connect(server, data))
    assert over
    assert time.monotonic() - began < 5
    assert received.count(b"HTTP/1.1 200") == data.count(b"\r\n\r\n")


def test_bytes_that_trickle_give_a_header_no_more_time(scripted, connect):
    _, server, _ = scripted(header_timeout=0.5)
    connection = connect(server, HALF)

    def send_slowly():
        for _ in range(100):
            connection.sendall(b"a")
            time.sleep(0.1)

    with pytest.raises(OSError, match=r"."):
        send_slowly()


def test_a_connection_is_kept_between_requests(scripted, connect):
    _, server, _ = scripted(header_timeout=0.3, idle_timeout=60)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    for pause in (1.2, 0):  # longer than a header may take, but none has begun
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ready"}'
        first = connection.sock
        time.sleep(pause)
    assert connection.sock is first is not None
    connection.close()


@pytest.mark.alone
def test_an_answer_that_nobody_reads_ends_the_connection(scripted, connect):
    scheduler, server, _ = scripted(["x" * 1_000_000] * 20, send_timeout=0.5)
    body = b'{"model": "glm4-tiny", "prompt": "x", "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connect(server, head + b"Content-Length: %d\r\n\r\n" % len(body) + body, SO_RCVBUF=4096)
    name = 'glm4_connections_ended_total{limit="send"} 1.0'
    for _ in range(100):
        if name in httpx.get(f"{server.url}/metrics").text:
            break
        time.sleep(0.1)
    assert name in httpx.get(f"{server.url}/metrics").text
    assert scheduler.tickets[0].cancelled.wait(5)


def test_a_long_answer_may_be_read_slowly(scripted, connect, monkeypatch):
    """Several times as long as a client may read nothing, although the connection is closing from the first byte on."""
    monkeypatch.setattr(connections, "_LINGER", 1.0)
    _, server, _ = scripted(["x" * 3_000_000], send_timeout=1.0)
    body = b'{"model": "glm4-tiny", "prompt": "x"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    connection = connect(server, head + b"Content-Length: %d\r\n\r\n" % len(body) + body, SO_RCVBUF=65536)
    received, began = 0, time.monotonic()
    while data := connection.recv(30_000):
        received += len(data)
        time.sleep(0.05)
    assert received > 3_000_000
    assert time.monotonic() - began > 3


def test_an_answer_that_is_over_is_not_kept_for_who_does_not_read(scripted, connect, monkeypatch):
    """Not for as long as an answer that still grows."""
    monkeypatch.setattr(connections, "_LINGER", 0.2)
    _, server, _ = scripted(["x" * 1_000_000] * 20, request_timeout=1.0, send_timeout=3600.0)
    body = b'{"model": "glm4-tiny", "prompt": "x", "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connect(server, head + b"Content-Length: %d\r\n\r\n" % len(body) + body, SO_RCVBUF=4096)
    end = time.monotonic() + 60
    while 'glm4_connections_ended_total{limit="send"} 1.0' not in httpx.get(f"{server.url}/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.alone
def test_an_unread_body_ends_with_its_connection(scripted, connect):
    """What follows a refusal is thrown away, for as long as a header may take."""
    _, server, _ = scripted(header_timeout=0.5, max_body_bytes=1000)
    connection = connect(
        server,
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
    )
    sent, began = 0, time.monotonic()
    with contextlib.suppress(OSError):
        while time.monotonic() - began < 8:
            connection.sendall(b"400\r\n" + b" " * 0x400 + b"\r\n")
            sent += 1
            time.sleep(0.01)
    assert time.monotonic() - began < 8


@pytest.mark.more
@pytest.mark.parametrize("attack", ["silent", "half a header", "half a body", "large bodies", "long prompts"])
def test_others_are_served_within_half_a_second(server_of, demo_bundle, connect, attack):
    """The real server under each attack: the median of a probe and of a small request."""
    header = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = b'{"prompt": "%b"}' % (b"a" * 3_900_000)
    data, count = {
        "silent": (b"", 1100),
        "half a header": (HALF, 1100),
        "half a body": (header + b"Content-Length: 4194304\r\n\r\n" + b" " * 4096, 1100),
        "large bodies": (header + b"Content-Length: 4194304\r\n\r\n" + b" " * 4_000_000, 60),
        "long prompts": (header + b"Content-Length: %d\r\n\r\n" % len(body) + body, 20),
    }[attack]
    with server_of(demo_bundle) as server:
        with contextlib.suppress(TimeoutError):
            for _ in range(count):
                connect(server, data)
        times = []
        for _ in range(9):
            times.append(healthy(server))
            began = time.perf_counter()
            asked = {"model": MODEL, "prompt": "x", "max_tokens": 1}
            assert httpx.post(f"{server.url}/v1/completions", json=asked, timeout=30).status_code == 200
            times.append(time.perf_counter() - began)
        assert sorted(times)[len(times) // 2] < 0.5
