"""Keys, limits, names, the end of the process, and what the log says."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from glm4_runtime.errors import RequestError
from glm4_runtime.server import ServerOptions, read_api_keys
from glm4_runtime.session.ort import OrtSession

MODEL = "glm4-tiny"
WHO = [{"role": "user", "content": "Tell me the password, please."}]
ASKED = {"model": MODEL, "messages": WHO}
CHAT = "/v1/chat/completions"


def eventually(found, expected=True):
    """Wait for what the server does after its answer has gone out."""
    for _ in range(3000):
        if found() == expected:
            return
        time.sleep(0.02)
    assert found() == expected


def kept_log(monkeypatch):
    """What the server writes to stderr from now on.

    Pytest's own capture empties its file as it is read, and loses what a server's thread writes meanwhile; and it
    takes sys.stderr back after the fixtures, so a test asks for this itself.
    """
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def logged_request(log, request_id):
    """The log, and the line of one request: a server of an earlier test may still be writing its last."""

    def found():
        whole = (line for line in log.getvalue().splitlines(keepends=True) if line.endswith("\n"))
        lines = [json.loads(line) for line in whole]
        return [line for line in lines if (line["event"], line.get("id")) == ("request", request_id)]

    eventually(lambda: len(found()), 1)
    return log.getvalue(), found()[0]


def test_a_key_opens_everything_but_health_and_the_page(scripted):
    _, server, client = scripted(["yes"], api_keys=("first", "sécond"))
    assert client.chat.completions.create(**ASKED).choices[0].message.content == "yes"
    for path in ("/", "/health", "/health/live", "/health/ready"):
        assert httpx.get(server.url + path).status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        for headers in (
            {},
            {"Authorization": "Bearer firs"},
            {"Authorization": "first"},
            {"Authorization": "Basic first"},
        ):
            refused = httpx.get(server.url + path, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
    for key in ("first", "sécond"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two # a colleague's\n")
    assert read_api_keys(file, {}) == ("one", "two")
    file.write_text("p#9fK\n#ours\none\n\n two # a colleague's\n")
    assert read_api_keys(file, {}) == ("p#9fK", "one", "two")
    file.write_text("# ours\none\n\n two # a colleague's\n")
    assert read_api_keys(file, {"GLM4_API_KEYS": "three, one,"}) == ("three", "one", "two")
    assert read_api_keys(None, {}) == ()
    file.write_text("# none\n")
    with pytest.raises(RequestError, match="no API key"):
        read_api_keys(file, {})
    with pytest.raises(RequestError, match="cannot be read"):
        read_api_keys(tmp_path / "missing", {})


def test_listening_beyond_this_machine_needs_a_key_or_a_word():
    assert ServerOptions().host == "127.0.0.1"
    with pytest.raises(RequestError, match="--allow-anonymous"):
        ServerOptions(host="0.0.0.0")
    assert ServerOptions(host="0.0.0.0", api_keys=("a",)).host_names is None
    assert ServerOptions(host="0.0.0.0", allow_anonymous=True).host_names is None
    assert "secret" not in repr(ServerOptions(api_keys=("secret",)))


@pytest.mark.parametrize("name", ["max_body_bytes", "max_queue", "request_timeout"])
def test_limits_are_above_zero(name):
    with pytest.raises(RequestError, match=name):
        ServerOptions(**{name: 0})


@pytest.mark.parametrize("name", ["request_timeout", "body_timeout", "drain_timeout"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_times_are_seconds(name, value):
    with pytest.raises(RequestError, match=name):
        ServerOptions(**{name: value})


def test_a_page_that_renames_this_machine_is_turned_away(scripted):
    _, server, _ = scripted()
    port = server.url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", ""):
        assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 421
    for host in ("localhost", f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 200
    assert (
        "access-control-allow-origin"
        not in httpx.get(f"{server.url}/health", headers={"Origin": "http://x"}).headers
    )


def test_a_long_body_is_refused_whether_it_says_so_or_not(scripted):
    _, server, _ = scripted(max_body_bytes=1000)
    parts = [b'{"model": "', b"x" * 2000, b'"}']
    for content in (b"".join(parts), iter(parts)):
        refused = httpx.post(server.url + CHAT, content=content)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "request_too_large"


def test_a_slow_body_is_refused(scripted):
    _, server, _ = scripted(body_timeout=0.2)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in connection.recv(1000)


def test_a_long_prompt_is_refused(scripted):
    _, server, _ = scripted(max_prompt_tokens=10)
    refused = httpx.post(
        server.url + CHAT, json={"model": MODEL, "messages": [{"role": "user", "content": "x " * 20}]}
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_a_request_ends_at_its_deadline(scripted):
    scheduler, _, client = scripted(["x"], request_timeout=100)
    before = time.monotonic()
    client.chat.completions.create(**ASKED)
    assert before + 100 <= scheduler.requests[0].deadline <= time.monotonic() + 100


@pytest.fixture
def slow_model(monkeypatch):
    """A step takes 10 ms at least, so that an answer as long as the model allows takes 20 s, also on a fast machine."""
    real = OrtSession._run_decoder

    def slowed(*arguments):
        time.sleep(0.01)
        return real(*arguments)

    monkeypatch.setattr(OrtSession, "_run_decoder", slowed)


def test_the_real_scheduler_ends_a_late_request(server_of, demo_bundle, slow_model):
    with server_of(demo_bundle, request_timeout=2) as server:
        body = ASKED | {"ignore_eos": True, "stream": True}
        lines = httpx.post(server.url + CHAT, json=body, timeout=60).text.split("\n\n")
        assert json.loads(lines[-3].removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert lines[-2] == "data: [DONE]"


@pytest.mark.alone
def test_a_full_queue_is_told(server_of, demo_bundle, slow_model):
    """Two pairs have the four slots, and one waits."""
    pair = ASKED | {"n": 2, "ignore_eos": True, "temperature": 1}
    with server_of(demo_bundle, max_queue=2) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        with contextlib.ExitStack() as running:
            for _ in range(2):
                running.enter_context(http.stream("POST", CHAT, json=pair | {"stream": True}))
            eventually(lambda: _metric(http, "glm4_active_slots"), 4)
            waiting = threading.Thread(
                target=http.post, args=(CHAT,), kwargs={"json": pair | {"max_tokens": 2}}
            )
            waiting.start()
            eventually(lambda: _metric(http, "glm4_queued_requests"), 2)
            refused = http.post(CHAT, json=pair)
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) >= 1
        waiting.join()
        assert http.post(CHAT, json=ASKED | {"max_tokens": 2}).status_code == 200
        never = http.post(CHAT, json=pair | {"n": 3})
        assert never.status_code == 400
        assert "this server gives 2" in never.json()["error"]["message"]


def test_a_disconnect_frees_the_slot(server_of, demo_bundle):
    with server_of(demo_bundle) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        with http.stream("POST", CHAT, json=ASKED | {"ignore_eos": True, "stream": True}) as response:
            lines = response.iter_lines()  # held: without it the response is closed
            next(lines)
            assert _metric(http, "glm4_active_slots") == 1
        eventually(lambda: _metric(http, "glm4_active_slots"), 0)
        assert _metric(http, 'glm4_sequences_total{outcome="cancelled"}') == 1


def _metric(http, name):
    lines = http.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name), 0.0)


def test_metrics(scripted):
    _, server, client = scripted(["a", "b", "c"])
    client.chat.completions.create(**ASKED)
    with httpx.Client(base_url=server.url) as http:
        http.get("/v1/nothing/of/the/kind")
        figures = {
            "glm4_queued_requests": 1,
            "glm4_active_slots": 2,
            "glm4_slots": 4,
            "glm4_prompt_tokens_total": 50,
            "glm4_cached_prompt_tokens_total": 20,
            "glm4_generated_tokens_total": 30,
            "glm4_drafted_tokens_total": 8,
            "glm4_accepted_tokens_total": 6,
            "glm4_steps_total": 9,
            'glm4_sequences_total{outcome="stop"}': 3,
            "glm4_first_token_seconds_count": 1,
            "glm4_inter_token_seconds_count": 2,
            "glm4_request_seconds_count": 1,
            f'glm4_http_requests_total{{route="{CHAT}",status="200"}}': 1,
            'glm4_http_requests_total{route="other",status="404"}': 1,
        }
        eventually(lambda: {name: _metric(http, name) for name in figures}, figures)


def test_the_cost_of_masks_is_measured(server, client):
    with httpx.Client(base_url=server.url) as http:
        before = _metric(http, "glm4_mask_seconds_count")
        form = {"response_format": {"type": "regex", "regex": "[0-9]{6}"}}
        client.chat.completions.create(**ASKED, extra_body=form)
        assert _metric(http, "glm4_mask_seconds_count") > before


def test_the_log_has_figures_and_no_words(scripted, monkeypatch):
    log = kept_log(monkeypatch)
    _, _, client = scripted(["an", "swer"])
    client.chat.completions.create(**ASKED, user="somebody", extra_headers={"X-Request-Id": "mine-1"})
    text, line = logged_request(log, "mine-1")
    assert "password" not in text
    assert "swer" not in text
    assert (line["id"], line["user"], line["status"], line["path"]) == ("mine-1", "somebody", 200, CHAT)
    assert (line["completion_tokens"], line["cached_tokens"], line["finish_reasons"]) == (2, 3, ["stop"])
    assert line["seconds"] >= line["first_token_seconds"] >= 0


def test_the_words_are_logged_where_asked_for(scripted, monkeypatch):
    log = kept_log(monkeypatch)
    _, _, client = scripted(["an", "swer"], log_prompts=True)
    client.chat.completions.create(**ASKED, extra_headers={"X-Request-Id": "mine-2"})
    _, line = logged_request(log, "mine-2")
    assert "password" in line["prompts"][0]
    assert line["answers"][0]["content"] == "answer"


def test_the_log_says_why_a_request_was_refused(scripted, monkeypatch):
    log = kept_log(monkeypatch)
    _, server, _ = scripted()
    cases = {
        "option": (ASKED | {"password": 1}, "password: there is no such option", "password"),
        "value": (
            ASKED | {"temperature": -1},
            "temperature must be a finite number of at least 0, not -1.0",
            None,
        ),
        "model": (
            ASKED | {"model": "password"},
            "there is no model '...' here; this server has '...'",
            "model",
        ),
        "grammar": (
            ASKED | {"response_format": {"type": "regex", "regex": "[password"}},
            "this format cannot be enforced",
            None,
        ),
    }
    for name, (body, reason, param) in cases.items():
        httpx.post(server.url + CHAT, json=body, headers={"X-Request-Id": name})
        text, line = logged_request(log, name)
        assert (line["error"], line.get("param")) == (reason, param)
    assert text.replace("password: there is no", "").replace('"param": "password"', "").count("password") == 0


def test_the_whole_reason_is_logged_where_words_are(scripted, monkeypatch):
    log = kept_log(monkeypatch)
    _, server, _ = scripted(log_prompts=True)
    httpx.post(server.url + CHAT, json=ASKED | {"model": "password"}, headers={"X-Request-Id": "whole"})
    assert "no model 'password'" in logged_request(log, "whole")[1]["error"]


def test_the_log_has_tokens_per_second(server, client, monkeypatch):
    log = kept_log(monkeypatch)
    more = {"extra_headers": {"X-Request-Id": "fast-1"}, "extra_body": {"ignore_eos": True}}
    client.chat.completions.create(**ASKED, max_tokens=40, **more)
    _, line = logged_request(log, "fast-1")
    decoding = line["seconds"] - line["first_token_seconds"]
    assert line["tokens_per_second"] >= 39 / decoding * 0.99


@pytest.mark.parametrize("level", ["info", "debug", "warning"])
def test_probes_are_logged_for_those_who_look_for_faults(scripted, monkeypatch, level):
    log = kept_log(monkeypatch)
    _, server, _ = scripted(log_level=level)
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200
    httpx.get(f"{server.url}/v1/models")
    wanted = {
        "debug": ["/health", "/health/live", "/health/ready", "/metrics", "/v1/models"],
        "info": ["/v1/models"],
        "warning": [],
    }[level]
    eventually(
        lambda: [json.loads(line).get("path") for line in log.getvalue().splitlines()[-5:] if "path" in line],
        wanted,
    )


def test_request_ids_are_ours_unless_plain(scripted):
    _, server, _ = scripted()
    assert httpx.get(f"{server.url}/health", headers={"X-Request-Id": "a-1"}).headers["x-request-id"] == "a-1"
    odd = httpx.get(f"{server.url}/health", headers={"X-Request-Id": 'a" b'}).headers["x-request-id"]
    assert odd.startswith("req_")


def test_draining_lets_requests_finish_and_takes_no_more(scripted):
    scheduler, server, client = scripted(["\na", None, "b"], drain_timeout=12)
    stream = client.chat.completions.create(**ASKED, stream=True)
    next(stream)
    next(stream)
    server._served.drain()
    assert httpx.get(f"{server.url}/health/ready").status_code == 503
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    refused = httpx.post(server.url + CHAT, json=ASKED)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "12")
    scheduler.go.set()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "b"
    assert scheduler.stopped_after == 12


def test_sigterm_drains_a_process_and_ends_it_well(demo_bundle):
    # a serving image holds none of these
    absent = "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'transformers', 'onnxscript')))"
    command = f"{absent}; from glm4_deploy.cli import main; main()"
    arguments = ["serve", str(demo_bundle), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        url = json.loads(process.stderr.readline())["url"]
        body = ASKED | {"stream": True, "max_tokens": 300, "ignore_eos": True}
        with httpx.stream("POST", url + CHAT, json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-4]
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
