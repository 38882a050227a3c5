"""Every extra can be resolved by pip, and brings what its users need and nothing that breaks another."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What a user of the extra cannot do without, and what would break or bloat a host.
BRINGS = {
    "cpu": ({"onnxruntime"}, {"onnxruntime-gpu", "torch"}),
    "cuda": (
        {"onnxruntime-gpu", "cuda-bindings", "nvidia-cublas", "nvidia-cuda-runtime", "nvidia-cudnn-cu13"},
        {"onnxruntime", "torch"},
    ),
    "export": ({"torch", "onnx", "onnx-ir", "onnxscript", "ml-dtypes"}, {"onnxruntime-gpu"}),
    "tensorrt-rtx": ({"tensorrt-rtx", "polygraphy", "cuda-bindings"}, {"tensorrt", "torch"}),
    "tensorrt": ({"triton", "polygraphy", "cuda-bindings"}, {"tensorrt-rtx", "torch"}),
    "plugins": ({"triton"}, {"torch"}),
    "serve": ({"fastapi", "uvicorn", "llguidance", "prometheus-client"}, {"onnxruntime", "torch"}),
    "validate": ({"matplotlib"}, {"torch"}),
    "bench": ({"httpx", "matplotlib"}, {"torch"}),
}
DEVELOPERS = {"test", "dev"}  # installed by make, which is the proof


def test_the_tables_name_extras_that_exist():
    assert BRINGS.keys() | DEVELOPERS <= EXTRAS.keys()
    made = re.search(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split(",")
    assert DEVELOPERS <= set(made) <= EXTRAS.keys()


def test_extras_that_the_texts_name_exist():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*"), *ROOT.glob("*/**/*.py")]
    named = {}
    for path in texts:
        if path.is_file() and path.relative_to(ROOT).parts[0] not in (".venv", "out", "tests"):
            text = path.read_text("utf-8")
            found = re.findall(r"(?:glm4-deploy|'\.)\[([a-z,\-]+)\]", text)
            found += re.findall(
                r"""["']([a-z\-]+)["']""", " ".join(re.findall(r"install_command\(.*?\)", text))
            )
            named |= dict.fromkeys(",".join(found).split(","), path)
    named.pop("", None)
    assert {"cpu", "cuda", "tensorrt", "hub"} <= named.keys()
    assert named.keys() <= EXTRAS.keys(), named


@pytest.mark.more  # where the index gives no metadata apart, pip fetches whole wheels, 1.3 GB for cuda
@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - DEVELOPERS))
def test_an_extra_can_be_resolved(extra, tmp_path):
    wanted = [*PROJECT["dependencies"], *EXTRAS[extra]]
    if (
        extra == "tensorrt"
    ):  # NVIDIA's placeholder fetches the libraries from NVIDIA's index, which may be out of reach
        wanted = [name for name in wanted if not name.startswith("tensorrt")]
    report = tmp_path / "report.json"
    options = ["--dry-run", "--ignore-installed", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--report", report, *wanted],
        check=True,
        timeout=500,
    )
    installed = {entry["metadata"]["name"] for entry in json.loads(report.read_text())["install"]}
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in installed}
    needed, refused = BRINGS.get(extra, (set(), {"onnxruntime", "torch"}))
    assert needed <= names
    assert not refused & names


@pytest.mark.more
def test_the_full_tensorrt_takes_its_libraries_from_nvidia():
    """What the documents say: the public index has a placeholder, which asks NVIDIA's index or fails by its name."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps"]
    done = subprocess.run(
        [*command, "tensorrt_cu13_libs"], capture_output=True, text=True, timeout=500, check=False
    )
    assert (
        done.returncode == 0
        or "placeholder package which downloads a real wheel" in done.stdout + done.stderr
    )
