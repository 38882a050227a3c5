"""What a command loads before it answers: modules, which are the same in every run, in place of seconds, which aren't.

`benchmarks/startup.py` measures the seconds.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from glm4_deploy.cli import COMMANDS

ROOT = Path(__file__).parents[2]
RUN = """
import sys
before = set(sys.modules)
from glm4_deploy.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
print(*set(sys.modules) - before, file=sys.stderr)
"""
# Of the standard library, what costs more than a whole --help does without it.
SLOW = {"asyncio", "ctypes", "dataclasses", "email", "hashlib", "http", "importlib.metadata", "json", "logging",
        "multiprocessing", "pickle", "random", "socket", "ssl", "subprocess", "tempfile", "urllib.request"}  # fmt: skip
# What runs a model, or makes or judges one: the help of a command needs none of it.
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "tokenizers", "safetensors",
         "jinja2", "rich", "fastapi", "uvicorn", "httpx", "llguidance", "matplotlib", "triton"}  # fmt: skip
# The help of export names targets and precisions, whose tables stand beside what needs NumPy.
NEEDS_NUMPY = {"export"}


def loaded(*arguments):
    """The modules that a command loads in a process of its own, those of a bare interpreter apart."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def ours(modules):
    return {name for name in modules if name.startswith("glm4_")}


def others(modules):
    """The packages, other than ours, that do not come with Python."""
    return {name.partition(".")[0] for name in modules - ours(modules)} - sys.stdlib_module_names


def test_help_loads_click_and_the_table_of_commands():
    modules = loaded("--help")
    assert others(modules) == {"click"}
    parts = {"glm4_deploy.cli", "glm4_deploy.interrupts", "glm4_deploy.streams"}
    assert ours(modules) == {"glm4_deploy", *parts, "glm4_runtime", "glm4_runtime.errors"}
    assert not modules & SLOW


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_nothing_that_computes(command):
    packages = others(loaded(command, "--help"))
    assert not packages & HEAVY
    assert ("numpy" in packages) == (command in NEEDS_NUMPY)


def test_the_version_is_looked_up_when_it_is_asked_for():
    assert "importlib.metadata" in loaded("--version")


def test_generate_loads_what_runs_a_bundle_and_nothing_else(demo_quantized):
    modules = loaded("generate", demo_quantized["int8"], "And it came to pass", "--max-tokens", "2")
    assert others(modules) == {"click", "numpy", "tokenizers", "onnxruntime"}
    assert {name.partition(".")[0] for name in ours(modules)} == {"glm4_deploy", "glm4_runtime"}
    behind = (
        "glm4_runtime.server",
        "glm4_runtime.scheduler",
        "glm4_runtime.chat_template",
        "glm4_runtime.structured",
    )
    assert not {name for name in modules if name.startswith(behind)}
    # NumPy and ONNX Runtime bring some of the slow ones along; these would be ours
    assert not modules & {"asyncio", "email", "http", "importlib.metadata", "multiprocessing", "ssl"}


def test_chat_leaves_the_template_engine_to_a_worker(demo_quantized):
    modules = loaded("generate", demo_quantized["int8"], "Who are you?", "--chat", "--max-tokens", "1")
    assert others(modules) == {"click", "numpy", "tokenizers", "onnxruntime"}
