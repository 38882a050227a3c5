"""Another bundle takes the place of the old one while clients ask, and replicas follow the load. No Ray here."""

import itertools
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from local_replicas import LocalReplica

from glm4_runtime.cluster.deployment import Deployment
from glm4_runtime.cluster.described import DescribedBundle
from glm4_runtime.cluster.keeper import Keeper
from glm4_runtime.cluster.order import Identity
from glm4_runtime.cluster.scaling import ReplicaCount, Scaler
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import serving, serving_model
from glm4_runtime.session import Session

PROMPTS = [f"Tell me story number {number}." for number in range(4)]
LATEST = 60  # seconds for what takes one on a machine at rest


def ask(url, prompt):
    body = {"model": "demo", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=LATEST)


def answers(bundle):
    options = ServerOptions(port=0, served_name="demo", log_level="warning")
    with Session.open(bundle, threads=1) as session, serving(session, options) as server:
        return {prompt: ask(server.url, prompt).json()["choices"][0]["text"] for prompt in PROMPTS}


def wait_until(found):
    end = time.monotonic() + LATEST
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def deploy(tmp_path, demo_cpu):
    """A function that starts a deployment of ``tmp_path/bundle`` by replicas in threads of this process."""
    folder, deployments = tmp_path / "bundle", []
    shutil.copytree(demo_cpu, folder)

    def maker(served):
        weights = str(sorted((name, entry.sha256) for name, entry in served.session.manifest.files.items()))
        same = Identity(weights, "code", "kernels", "cpu", (512, 4))
        return lambda name: LocalReplica(name, folder, same)

    def start(count, room=lambda: True):
        options = ServerOptions(port=0, served_name="demo", log_level="warning")
        deployment = Deployment(lambda: DescribedBundle(folder, {}), options, count, 60.0)
        deployments.append(deployment)
        deployment.start(maker, room)
        return deployment

    yield folder, start
    for deployment in deployments:
        deployment.stop()


@pytest.mark.parametrize(("count", "room"), [(1, True), (2, True), (2, False)])
def test_a_change_of_the_bundle_refuses_nothing_and_mixes_nothing(deploy, demo_cpu, other_cpu, count, room):
    folder, start = deploy
    old, new = answers(demo_cpu), answers(other_cpu)
    assert all(old[prompt] != new[prompt] for prompt in PROMPTS)
    deployment, changed, seen = start(ReplicaCount(count, count), lambda: room), threading.Event(), []
    first = deployment.current

    def change(server):
        deployment.change(server)
        changed.set()

    with serving_model(first.served, change) as server:

        def client(number):
            for turn in itertools.count(number):
                before = changed.is_set()
                answer = ask(server.url, PROMPTS[turn % len(PROMPTS)])
                seen.append((PROMPTS[turn % len(PROMPTS)], answer.status_code, answer.text and answer.json()))
                if before:
                    return

        with ThreadPoolExecutor(6) as pool:
            running = [pool.submit(client, number) for number in range(6)]
            wait_until(lambda: len(seen) > 12)
            folder.rename(folder.with_name("before"))
            shutil.copytree(other_cpu, folder.with_name("next")).rename(folder)
            server.handle_exit(signal.SIGHUP, None)
            for one in running:
                one.result(LATEST)
        assert {status for _, status, _ in seen} == {200}
        texts = [(prompt, body["choices"][0]["text"]) for prompt, _, body in seen]
        assert all(text in (old[prompt], new[prompt]) for prompt, text in texts)
        assert all(text == old[prompt] for prompt, text in texts[:12])
        assert all(text == new[prompt] for prompt, text in texts[-6:])
        assert deployment.current is not first
        assert len(deployment.current.keeper) == count
        assert len(httpx.get(f"{server.url}/health/replicas").json()["replicas"]) == count
        metrics = httpx.get(f"{server.url}/metrics").text
        (answered,) = [
            line for line in metrics.splitlines() if line.startswith('glm4_sequences_total{outcome="length"}')
        ]
        ends = [body["choices"][0]["finish_reason"] for _, _, body in seen]
        # the counters go on over a change; those of the last answers may still be on their way
        assert float(answered.split()[-1]) >= ends.count("length") - 6


def test_a_damaged_bundle_changes_nothing(deploy):
    folder, start = deploy
    deployment = start(ReplicaCount(1, 1))
    current, tried = deployment.current, threading.Event()

    def change(server):
        deployment.change(server)
        tried.set()

    with serving_model(current.served, change) as server:
        (folder / "manifest.json").write_text("{")
        server.handle_exit(signal.SIGHUP, None)
        assert tried.wait(LATEST)
        assert deployment.current is current
        assert ask(server.url, PROMPTS[0]).status_code == 200


def test_replicas_follow_the_load(deploy, monkeypatch):
    monkeypatch.setattr("glm4_runtime.cluster.deployment._LOOK", 0.02)
    _, start = deploy
    deployment = start(ReplicaCount(1, 3, shrink_after=0.5))
    with serving_model(deployment.current.served) as server, ThreadPoolExecutor(12) as pool:
        end = threading.Event()

        def client(number):
            while not end.is_set():
                assert ask(server.url, PROMPTS[number % 4]).status_code == 200

        running = [pool.submit(client, number) for number in range(12)]
        wait_until(lambda: len(deployment.current.fleet.stats_by_replica()) == 3)
        end.set()
        for one in running:
            one.result(LATEST)
        wait_until(lambda: len(deployment.current.fleet.stats_by_replica()) == 1)
        assert ask(server.url, PROMPTS[0]).status_code == 200


def replaced(folder, bundle):
    folder.rename(folder.with_name("before"))
    shutil.copytree(bundle, folder)


@pytest.mark.parametrize(("step", "changes"), [("add", False), ("remove", True)])
def test_an_unknown_error_leaves_one_whole_version(deploy, demo_cpu, other_cpu, monkeypatch, step, changes):
    """Of Ray, say: before the new bundle gets requests, or after."""
    folder, start = deploy
    expected = answers(other_cpu if changes else demo_cpu)
    deployment = start(ReplicaCount(2, 2))
    first = deployment.current

    def broken(*_, **__):
        raise RuntimeError("of Ray")

    with serving_model(first.served) as server:
        replaced(folder, other_cpu)
        monkeypatch.setattr(Keeper, step, broken)
        deployment.change(server)
        assert (deployment.current is not first) == changes
        wait_until(lambda: len(deployment.current.fleet.stats_by_replica()) == 2)
        assert len(deployment.current.keeper) == 2
        assert {
            prompt: ask(server.url, prompt).json()["choices"][0]["text"] for prompt in PROMPTS
        } == expected


def test_a_look_at_the_load_refuses_no_change(deploy, other_cpu, monkeypatch):
    folder, start = deploy
    looks = threading.Event()

    def slow(*_):
        looks.set()
        time.sleep(0.3)
        return 1

    monkeypatch.setattr(Scaler, "wanted", slow)
    deployment = start(ReplicaCount(1, 2))
    first = deployment.current
    with serving_model(first.served) as server:
        ask(server.url, PROMPTS[0])  # the fleet knows its slots
        replaced(folder, other_cpu)
        assert looks.wait(LATEST)
        looks.clear()
        assert looks.wait(LATEST)
        deployment.change(server)
    assert deployment.current is not first
