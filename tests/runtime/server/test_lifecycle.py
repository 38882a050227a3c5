"""From the port that is taken first to the signal that ends it all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from glm4_runtime.errors import RequestError
from glm4_runtime.server.run import bind

MODEL = "glm4-tiny"
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
CHAT = "/v1/chat/completions"


def serving_process(bundle, *options, before=""):
    command = f"{before}\nfrom glm4_deploy.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", command, "serve", str(bundle), "--port", "0", "--threads", "1", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_port_in_use_is_told_before_anything_is_loaded(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, err = run("serve", tmp_path / "nothing to load", "--port", port)
    assert (code, out) == (1, "")
    assert err == (
        f"glm4-deploy: cannot listen on 127.0.0.1, port {port}: another program listens there; end it, or choose "
        "another port by --port\n"
    )


def test_a_port_that_another_server_took_meanwhile_is_told(run, demo_bundle, monkeypatch):
    """Two servers that start at one time may both be bound; one of them listens first."""
    from glm4_runtime.server import run as module

    (one,) = bind("127.0.0.1", 0)
    (other,) = bind("127.0.0.1", one.getsockname()[1])
    one.listen()
    monkeypatch.setattr(module, "bind", lambda *_where: [other])
    code, _, err = run("serve", demo_bundle, "--port", 1234)
    assert code == 1
    assert err.splitlines()[-1].startswith(
        "glm4-deploy: cannot listen on 127.0.0.1, port 1234: another program"
    )
    assert "Traceback" not in err
    one.close()


def test_every_address_of_a_name_gets_the_same_port():
    sockets = bind("localhost", 0)
    assert len({found.getsockname()[1] for found in sockets}) == 1
    for found in sockets:
        found.close()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_here_is_refused(host):
    with pytest.raises(RequestError, match=f"cannot listen on {host}"):
        bind(host, 0)


def test_while_a_server_drains_new_requests_are_told(scripted):
    scheduler, server, client = scripted(["\na", None, "b"], drain_timeout=12)
    stream = client.chat.completions.create(**ASKED, stream=True)
    next(stream)
    next(stream)
    server.handle_exit(signal.SIGTERM, None)
    deadline = time.monotonic() + 10
    while httpx.get(f"{server.url}/health/ready").status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    refused = httpx.post(server.url + CHAT, json=ASKED)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "12")
    assert refused.json()["error"]["code"] == "shutting_down"
    assert refused.headers["connection"] == "close"
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    scheduler.go.set()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "b"


def test_a_second_interrupt_does_not_wait(server_of, demo_bundle):
    with server_of(demo_bundle, drain_timeout=600) as server:
        body = ASKED | {"ignore_eos": True, "stream": True, "max_tokens": 2000}
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.handle_exit(signal.SIGINT, None)
            server.handle_exit(signal.SIGINT, None)
            rest = [line for line in lines if line]
        assert '"code":"shutting_down"' in rest[-2]


def test_the_log_says_that_a_signal_came_and_when_all_was_done(demo_bundle):
    process = serving_process(demo_bundle)
    try:
        url = json.loads(process.stderr.readline())["url"]
        body = ASKED | {"stream": True, "max_tokens": 400, "ignore_eos": True}
        with httpx.stream("POST", url + CHAT, json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert process.wait(timeout=30) == 0
        logged = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert [line["event"] for line in logged] == ["draining", "request", "stopped"]
        assert (logged[0]["signal"], logged[0]["drain_seconds"]) == ("SIGTERM", 30.0)
        assert logged[0]["active"] in (0, 1)  # the last token may be on its way
        assert logged[2]["seconds"] >= 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_it_at_once(demo_bundle, sent):
    """Also where the code that it interrupts swallows exceptions."""
    stubborn = (
        "import sys, time; from glm4_runtime import Session\n"
        "def load(*_, **__):\n"
        "    print('loading', file=sys.stderr, flush=True)\n"
        "    while True:\n"
        "        try: time.sleep(60)\n"
        "        except BaseException: pass\n"
        "Session.open = staticmethod(load)\n"
    )
    process = serving_process(demo_bundle, before=stubborn)
    try:
        assert process.stderr.readline() == "loading\n"
        process.send_signal(sent)
        assert process.wait(timeout=10) == 130
        assert process.stderr.read() == "glm4-deploy: interrupted\n"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
