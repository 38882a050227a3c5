"""The dashboard: its metrics exist, and a real Prometheus answers its queries about a server under load."""

import contextlib
import os
import shutil
import subprocess
import threading
import time

import httpx
import pytest
import yaml
from dashboard import ROOT, draw, metrics_of, named, panels, queries
from local_replicas import LocalReplica, joined

from glm4_runtime.cluster.fleet import Fleet
from glm4_runtime.cluster.serve import DescribedBundle
from glm4_runtime.server import ServerOptions
from glm4_runtime.server.run import bind, serving


@pytest.fixture
def replicated(demo_bundle):
    """A server with two replicas: it has all metrics."""
    fleet = Fleet(max_queue=64)
    replicas = [joined(fleet, LocalReplica(name, demo_bundle)) for name in "ab"]
    try:
        with serving(DescribedBundle(demo_bundle, {}), ServerOptions(port=0), fleet) as server:
            yield server
    finally:
        fleet.stop(0)
        for replica in replicas:
            replica.close()


def test_each_metric_of_the_dashboard_is_one_of_the_servers(replicated):
    httpx.get(f"{replicated.url}/health")
    deadline = time.monotonic() + 20
    while "glm4_replica_" not in (text := httpx.get(f"{replicated.url}/metrics").text):
        assert time.monotonic() < deadline  # a replica's figures come with its first report
    known = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    used = set().union(*(metrics_of(query) for _, query, _ in queries()))
    assert len(used) > 15
    assert used <= known


def test_the_dashboard_is_whole():
    found = panels()
    assert len({panel["id"] for panel in found}) == len(found)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in found]
    assert len(set(places)) == len(places)
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in found)
    assert all(panel["description"] and panel["title"] for panel in found)
    assert all(target["legendFormat"] for panel in found for target in panel["targets"])


def test_compose_mounts_files_that_exist():
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    mounted = [mount for service in compose["services"].values() for mount in service["volumes"]]
    ours = [mount.split(":")[0] for mount in mounted if mount.startswith("./")]
    assert len(ours) == 3
    assert all((ROOT / "deploy" / path).exists() for path in ours)
    server = compose["services"]["server"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]


@contextlib.contextmanager
def prometheus(target, folder):
    """Debian's Prometheus on loopback, which scrapes a server each second; its URL."""
    settings = yaml.safe_load((ROOT / "deploy/prometheus.yaml").read_text())
    settings["global"]["scrape_interval"] = "1s"
    (job,) = settings["scrape_configs"]
    job["static_configs"] = [{"targets": [target.removeprefix("http://")]}]
    (folder / "key").write_text("key")
    job["authorization"]["credentials_file"] = str(folder / "key")
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    (listening,) = bind("127.0.0.1", 0)
    port = listening.getsockname()[1]
    listening.close()
    url = f"http://127.0.0.1:{port}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
    ]
    process = subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL
    )
    try:
        yield url
    finally:
        process.terminate()
        process.wait(30)


def load(url, seconds):
    """Chats of four clients, some with a form, then one client whose text repeats, which is guessed."""
    end = time.monotonic() + seconds

    def client(number):
        while time.monotonic() < end - seconds / 3:
            chat = {"messages": [{"role": "user", "content": f"Who are you, {number}?"}], "max_tokens": 40}
            form = {"response_format": {"type": "json_object"}} if number == 0 else {}
            httpx.post(f"{url}/v1/chat/completions", json={"model": "glm4-tiny"} | chat | form, timeout=60)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    while time.monotonic() < end:
        body = {"model": "glm4-tiny", "prompt": "one two three " * 12, "max_tokens": 40, "temperature": 0}
        httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def asked(url, query, **times):
    answer = httpx.get(f"{url}/api/v1/query_range", params={"query": query, "step": "1", **times}, timeout=30)
    answer.raise_for_status()
    return [
        (one["metric"], [float(at) for at, _ in one["values"]], [float(value) for _, value in one["values"]])
        for one in answer.json()["data"]["result"]
    ]


@pytest.mark.more
@pytest.mark.alone
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_answers_each_query_about_a_server_under_load(replicated, tmp_path):
    began = time.time()
    with prometheus(replicated.url, tmp_path) as url:
        until_ready(url)
        load(replicated.url, 30)
        answers = {}
        for title, query, legend in queries():
            series = asked(url, query, start=began, end=time.time())
            assert series, f"{title}: {query}"
            values = [value for _, _, values in series for value in values]
            assert any(value == value for value in values), f"{title}: only NaN"
            answers.setdefault(title, []).extend(
                (named(legend, labels), at, values) for labels, at, values in series
            )
    draw(answers, os.environ.get("DASHBOARD_PICTURE", tmp_path / "dashboard.png"))
    highest = {title: max(max(values) for _, _, values in series) for title, series in answers.items()}
    assert highest["Tokens per second"] > 1
    assert highest["Slots and queue"] == 8
    assert highest["Shares of time"] > 0


def until_ready(url):
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/-/ready").status_code == 200:
                return
        assert time.monotonic() < end
        time.sleep(0.2)
