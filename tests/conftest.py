"""Small checkpoints and the bundles made of them, shared by all tests of one run."""

import json
from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint
from slow_tests import (  # noqa: F401  pytest finds its hooks here
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_call,
    pytest_terminal_summary,
)

from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters import trace as traces

TRACES: dict = {}
trace_anew = traces.trace


@pytest.fixture(scope="session", autouse=True)
def traced_once():
    """Trace each configuration once in a run: a trace takes ten times the rest of a small export."""

    def trace(config, task, activations):
        key = json.dumps([config.to_dict(), task, activations])
        if key not in TRACES:
            TRACES[key] = trace_anew(config, task, activations)
        return TRACES[key].clone()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(traces, "trace", trace)
        yield


@pytest.fixture
def traced_anew(monkeypatch, traced_once):
    """For tests of the trace itself."""
    monkeypatch.setattr(traces, "trace", trace_anew)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A random causal LM of two layers in float32, without a tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tiny_config())


@pytest.fixture(scope="session")
def tiny_bundles(tmp_path_factory, tiny_checkpoint):
    """:func:`tiny_checkpoint` for targets ort and native in fp32, by target."""
    folder = tmp_path_factory.mktemp("bundles")
    for target in ("ort", "native"):
        export(
            tiny_checkpoint, folder / target, ExportOptions(target=target, precision="fp32", max_batch_size=4)
        )
    return {target: folder / target for target in ("ort", "native")}


@pytest.fixture(params=["ort", "native"])
def tiny_bundle(request, tiny_bundles):
    """Each of these two bundles in turn."""
    return tiny_bundles[request.param]


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory):
    """The trained demo checkpoint in fp32, with its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("demo") / "glm4-tiny"
    demo = Path(__file__).parents[1] / "demo" / "glm4-tiny"
    export(demo, folder, ExportOptions(precision="fp32", max_batch_size=4, parity=False))
    return folder


@pytest.fixture(scope="session")
def demo_quantized(tmp_path_factory):
    """The demo checkpoint for the default target in int8 and int4, and in int8 for target cpu, by these names."""
    folder = tmp_path_factory.mktemp("quantized")
    demo = Path(__file__).parents[1] / "demo" / "glm4-tiny"
    for precision in ("int8", "int4"):
        export(demo, folder / precision, ExportOptions(precision=precision, parity=False))
    export(demo, folder / "cpu", ExportOptions(target="cpu", parity=False))
    return {name: folder / name for name in ("int8", "int4", "cpu")}


@pytest.fixture(scope="session")
def demo_cpu(tmp_path_factory):
    """The demo checkpoint for target cpu in int8, with four slots: its tokens never depend on other requests."""
    folder = tmp_path_factory.mktemp("cpu") / "glm4-tiny"
    demo = Path(__file__).parents[1] / "demo" / "glm4-tiny"
    export(demo, folder, ExportOptions(target="cpu", max_batch_size=4, parity=False))
    return folder


@pytest.fixture(scope="session")
def demo_staged(tmp_path_factory):
    """The bundle ``demo_cpu`` in two stages, with the same bits."""
    folder = tmp_path_factory.mktemp("staged") / "glm4-tiny"
    demo = Path(__file__).parents[1] / "demo" / "glm4-tiny"
    export(demo, folder, ExportOptions(target="cpu", max_batch_size=4, stages=(1, 3), parity=False))
    return folder


@pytest.fixture(scope="session")
def demo_draft(tmp_path_factory):
    """The demo's draft model for target cpu in int8, with four slots."""
    folder = tmp_path_factory.mktemp("draft") / "glm4-tiny-draft"
    draft = Path(__file__).parent.parent / "demo" / "glm4-tiny-draft"
    export(draft, folder, ExportOptions(target="cpu", max_batch_size=4, parity=False))
    return folder


@pytest.fixture(scope="session")
def demo_slots(tmp_path_factory):
    """The demo checkpoint for target cpu in int8, with four slots, that takes three adapters at run time."""
    folder = tmp_path_factory.mktemp("slots") / "glm4-tiny"
    demo = Path(__file__).parents[1] / "demo" / "glm4-tiny"
    options = ExportOptions(target="cpu", max_batch_size=4, parity=False, lora_slots=3, lora_rank=8)
    export(demo, folder, options)
    return folder


@pytest.fixture(scope="session")
def demo_adapters(tmp_path_factory):
    """Random adapters of the demo checkpoint, by name."""
    from adapters import write_adapter

    folder = tmp_path_factory.mktemp("adapters")
    demo = Path(__file__).parents[1] / "demo" / "glm4-tiny"
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    return {
        name: write_adapter(demo, folder / name, seed=seed, target_modules=every, r=rank)
        for seed, (name, rank) in enumerate({"poet": 4, "clerk": 8, "coder": 2}.items())
    }


@pytest.fixture
def edited_manifest(tmp_path, tiny_bundles):
    """A function that copies a bundle and changes fields of its manifest."""
    import shutil

    def edit(**changes):
        folder = tmp_path / "edited"
        shutil.copytree(tiny_bundles["ort"], folder)
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return edit


@pytest.fixture
def run(capsys):
    """Run a command in this process: exit code, stdout, stderr."""
    from glm4_deploy.cli import main

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return call
