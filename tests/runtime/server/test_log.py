"""A log that nobody reads: serving goes on, little is kept, and what is dropped is counted."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading

import httpx

from glm4_runtime.server.log_writer import LogWriter


def told(count):
    return json.dumps({"event": "dropped", "lines": count})


@contextlib.contextmanager
def unread(monkeypatch):
    """The reading end of a pipe that stands in for stderr. No fixture: pytest takes sys.stderr back after those."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as writer:
        monkeypatch.setattr(sys, "stderr", writer)
        yield reader


def fill(writer, pipe):
    """A line that is longer than a pipe holds, 64 KiB; returns when the writer's thread waits within the line."""
    writer.write("x" * 2**17)
    select.select([pipe], [], [])


def test_lines_come_in_order_and_whole(monkeypatch):
    with unread(monkeypatch) as pipe:
        writer = LogWriter(told)
        lines = [f"{number} \ud800 {'é' * number}" for number in range(100)]
        for line in lines:
            writer.write(line)
        assert writer.flush(30)
        expected = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
        assert pipe.read(len(expected)) == expected
        assert writer.dropped == 0


def test_writing_never_waits_and_tells_how_much_was_dropped(monkeypatch):
    with unread(monkeypatch) as pipe:
        writer = LogWriter(told, most=2**17 + 1000)
        fill(writer, pipe)
        for _ in range(500):
            writer.write("y" * 100)
        assert writer.dropped == 490
        assert not writer.flush(0.01)
        assert pipe.read(2**17 + 1) == b"x" * 2**17 + b"\n"
        rest = pipe.read(len(told(490)) + 1 + 10 * 101).decode().splitlines()
        assert rest == [told(490), *["y" * 100] * 10]
        assert writer.flush(30)
        writer.write("z")
        assert writer.flush(30)
        assert pipe.read(2) == b"z\n"  # dropped lines are told of once


def test_a_reader_that_is_gone_harms_nobody(monkeypatch):
    with unread(monkeypatch) as pipe:
        writer = LogWriter(told)
        pipe.close()
        writer.write("x")
        assert writer.flush(30)


def test_a_server_whose_log_nobody_reads_goes_on_and_ends(demo_bundle):
    """Its log is longer than a pipe holds, before and after."""
    command = [
        sys.executable, "-c", "from glm4_deploy.cli import main; main()",
        "serve", str(demo_bundle), "--port", "0", "--threads", "1", "--log-prompts",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    # ends a server that waits for its reader, so that the test fails and does not hang
    rescue = threading.Timer(60, process.kill)
    rescue.start()
    try:
        url = json.loads(process.stderr.readline())["url"]
        body = {"model": "glm4-tiny", "messages": [{"role": "user", "content": "a " * 500}], "max_tokens": 1}
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(100):
                answer = client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
            assert "glm4_log_lines_dropped_total 0.0" in client.get("/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        rescue.cancel()
        process.kill()
        process.wait()
        process.stderr.close()
