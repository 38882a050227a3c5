"""Replicas on a real Ray cluster are killed while clients read: no answer is lost or changed."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import httpx
import openai
import pytest
from collector import collecting
from cpu_operators import needs_cpu_operators

from benchmarks.chaos_clients import ask, questions
from glm4_runtime.cluster.described import DescribedBundle
from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.keeper import Keeper
from glm4_runtime.cluster.ray_module import require_ray
from glm4_runtime.cluster.replica import RayReplica, ReplicaOptions
from glm4_runtime.cluster.start import connect
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving
from glm4_runtime.session import Session

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; run make install")

QUESTIONS = questions(prompts=2)


def answers(url, on_answer=lambda: None):
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        ThreadPoolExecutor(8) as clients,
    ):
        model = client.models.list().data[0].id

        def one(question):
            found = ask(client, model, *question)
            on_answer()
            return found

        return list(clients.map(one, QUESTIONS))


@pytest.mark.alone
# at the end of Ray, a thread that starts a replica gets SystemExit, which ends the thread as it should
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_answer_is_lost_or_changed_when_replicas_are_killed(demo_cpu):
    with Session.open(demo_cpu, threads=1) as session, serving(session, ServerOptions(port=0)) as server:
        wanted = answers(server.url)
    connect(None)
    assert require_ray().util.get_node_ip_address() == "127.0.0.1"
    fleet, pids, ended, done = Fleet(64), {}, itertools.count(), threading.Event()
    try:
        bundle = DescribedBundle(demo_cpu, {})
        options = ReplicaOptions(str(demo_cpu), bundle.manifest.model.eos_token_ids, 64, {"threads": 1})

        def make(name):
            replica = RayReplica(name, options, 30.0, 0)
            pids[name] = replica.pid
            return replica

        keeper = Keeper(fleet, make, 30.0)
        with serving(bundle, ServerOptions(port=0), fleet) as server:
            keeper.start(3)

            def kill():
                """Kill a replica after 8 answers, and another one once each moved request has a new token."""
                count = 0
                while not done.wait(0.02) and count < 2:
                    if (
                        heard[0] >= 8 * (count + 1)
                        and len(fleet.stats_by_replica()) >= 2
                        and not fleet.suspects
                    ):
                        os.kill(pids[str(count)], signal.SIGKILL)
                        count += 1

            heard = [0]

            def hear():
                heard[0] = next(ended) + 1

            killer = threading.Thread(target=kill)
            killer.start()
            found = answers(server.url, hear)
            done.set()
            killer.join()
            assert fleet.deaths >= 2
            assert fleet.migrations >= 1
            end = time.monotonic() + 20
            while any(one.active or one.queued for one in fleet.stats_by_replica().values()):
                assert time.monotonic() < end, "a slot is leaked"
                time.sleep(0.05)
            metrics = httpx.get(f"{server.url}/metrics").text
            assert 'glm4_replica_slots{replica="2"} 4.0' in metrics
            assert httpx.get(f"{server.url}/health/replicas").json()["replicas"]
            keeper.stop()
    finally:
        require_ray().shutdown()
    for question, ours, theirs in zip(QUESTIONS, found, wanted, strict=True):
        assert ours == theirs, question


@pytest.mark.alone
def test_the_command_scales_and_changes_the_bundle_without_a_refused_request(demo_cpu, other_cpu, tmp_path):
    folder, log = tmp_path / "bundle", tmp_path / "log"
    shutil.copytree(demo_cpu, folder)
    command = [sys.executable, "-m", "glm4_deploy", "serve", str(folder), "--replicas", "1:2", "--port", "0"]
    with log.open("w") as lines, subprocess.Popen([*command, "--threads", "1"], stderr=lines) as server:
        try:
            url = waited(log, "listening")["url"]
            end, seen = threading.Event(), []

            def client(number):
                while not end.is_set():
                    body = {
                        "model": "bundle",
                        "prompt": f"Story {number}:",
                        "max_tokens": 24,
                        "temperature": 0,
                    }
                    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
                    seen.append((number, answer.status_code, answer.json()["choices"][0]["text"]))

            with ThreadPoolExecutor(8) as pool:
                clients = [pool.submit(client, number) for number in range(8)]
                until(lambda: len(httpx.get(f"{url}/health/replicas").json().get("replicas", ())) == 2)
                folder.rename(tmp_path / "before")
                shutil.copytree(other_cpu, tmp_path / "next").rename(folder)
                server.send_signal(signal.SIGHUP)
                assert waited(log, "change_")["event"] == "change_began"
                assert waited(log, "change_ended")["replicas"] == 2
                end.set()
                for one in clients:
                    one.result(60)
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert {status for _, status, _ in seen} == {200}
    texts = [{text for asked, _, text in seen if asked == number} for number in range(8)]
    assert max(map(len, texts)) == 2, "one text of each bundle, which may be the same"


@pytest.mark.alone
@pytest.mark.more
@needs_cpu_operators
def test_adapters_answer_alike_on_replicas_that_come_and_go(demo_slots, demo_adapters, tmp_path):
    with Session.open(demo_slots, threads=1) as session:
        for name, adapter in demo_adapters.items():
            session.load_adapter(name, adapter)
        wanted = {}
        for name in (None, *demo_adapters):
            session.adapter = name
            tokens = session.generate(
                session.tokenizer.encode("Story:"), SamplingParams(max_tokens=24, temperature=0)
            )
            wanted[name or "bundle"] = session.tokenizer.decode([token.id for token in tokens])
    assert len(set(wanted.values())) == 4
    # the folder's name is the model's
    folder, log = tmp_path / "bundle", tmp_path / "log"
    shutil.copytree(demo_slots, folder)
    command = [sys.executable, "-m", "glm4_deploy", "serve", str(folder), "--replicas", "1:2", "--port", "0"]
    command += [part for name, adapter in demo_adapters.items() for part in ("--lora", f"{name}={adapter}")]
    command += ["--threads", "1", "--shrink-after", "1"]
    with log.open("w") as lines, subprocess.Popen(command, stderr=lines) as server:
        try:
            url = waited(log, "listening")["url"]
            assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == list(wanted)

            def client(number):
                name = list(wanted)[number % 4]
                body = {"model": name, "prompt": "Story:", "max_tokens": 24, "temperature": 0}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
                return name, answer.status_code, answer.json()["choices"][0]["text"]

            def replicas():
                return len(httpx.get(f"{url}/health/replicas").json().get("replicas", ()))

            with ThreadPoolExecutor(12) as pool:
                seen = list(pool.map(client, range(200)))
                grown = replicas()
                until(lambda: replicas() == 1)
                seen += list(pool.map(client, range(4)))
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert grown == 2
    for name, status, text in seen:
        assert (status, text) == (200, wanted[name]), name


@pytest.mark.alone
@pytest.mark.more
def test_a_trace_goes_through_ray(demo_cpu, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "glm4_deploy", "serve", str(demo_cpu), "--replicas", "1", "--port", "0"]
    environment = os.environ | {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test"}
    body = {"model": "glm4-tiny", "prompt": "Story:", "max_tokens": 3}
    trace = "0af7651916cd43dd8448eb211c80319c"
    with (
        collecting() as collector,
        log.open("w") as lines,
        subprocess.Popen([*command, "--traces", collector.url], stderr=lines, env=environment) as server,
    ):
        try:
            url = waited(log, "listening")["url"]
            headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
            httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()
            until(lambda: any(span.name == "replica" for span in collector.spans))
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    by_name = {span.name: (resource, span) for resource, spans in collector.resources for span in spans}
    (ours, request), (theirs, order) = by_name["text_completion glm4-tiny"], by_name["replica"]
    assert {span.trace_id.hex() for _, span in by_name.values()} == {trace}
    assert order.parent_span_id == request.span_id
    assert theirs["service.instance.id"] == "0"
    assert "service.instance.id" not in ours or ours["service.instance.id"] != "0"
    assert theirs["deployment.environment"] == ours["deployment.environment"] == "test"


def until(found):
    end = time.monotonic() + 60
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def waited(log, event):
    """The first line of an event whose name begins so."""

    def line():
        found = [
            json.loads(one)
            for one in log.read_text().splitlines()
            if one.startswith("{") and one.endswith("}")
        ]
        return next((one for one in found if one["event"].startswith(event)), None)

    return until(line)
