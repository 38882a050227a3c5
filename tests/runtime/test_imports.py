"""A serving image holds neither torch nor onnx: nothing in the runtime may load them."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import glm4_runtime

IMPORT_ALL = """
import importlib, pkgutil, sys
import glm4_runtime

def fail(name):
    raise

names = [module.name for module in pkgutil.walk_packages(glm4_runtime.__path__, "glm4_runtime.", onerror=fail)]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # an optional dependency that is not installed here
        if error.name.partition(".")[0].startswith("glm4") or error.name in ("torch", "onnx"):
            raise
assert {"glm4_runtime.sampling", "glm4_runtime.tokenizer", "glm4_runtime.chat_template", "glm4_runtime.generate"} <= set(names)
print(*sorted({"torch", "onnx", "transformers", "glm4_exporters", "glm4_plugins", "glm4_deploy"} & set(sys.modules)))
"""


def test_the_runtime_loads_neither_torch_nor_onnx_nor_our_other_packages():
    path = os.pathsep.join([str(Path(glm4_runtime.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


ROOT = Path(__file__).parents[2]
# What each package imports of the others, as docs/architecture.md has it.
MAY_IMPORT = {
    "exporters/glm4_exporters": {
        "glm4_plugins",
        *(f"glm4_runtime.{m}" for m in ("adapters", "bundle", "errors", "install", "progress")),
    },
    "runtime/glm4_runtime": set(),
    "plugins/glm4_plugins": set(),
}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_of_the_others_what_it_may(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                own = name.split(".")[0] == Path(package).name
                allowed = any(name == one or name.startswith(f"{one}.") for one in MAY_IMPORT[package])
                assert own or allowed or not name.startswith("glm4_"), f"{file} imports {name}"
