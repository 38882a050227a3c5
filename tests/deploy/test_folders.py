"""What a path is, and what each command says about a path of another kind."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest

from glm4_deploy import folders
from glm4_deploy.folders import FOLDER_KINDS, kind_of, require_bundle, require_checkpoint, require_either
from glm4_deploy.inspect import inspect
from glm4_runtime.errors import Glm4Error
from glm4_runtime.tokenizer import Tokenizer

CACHE = "models--THUDM--GLM-4-9B-0414"


@pytest.fixture
def things(tmp_path):
    """A thing of each kind, by the kind's name."""

    def make(name, **files):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text)
        return folder

    quantized = json.dumps({"quantization_config": {"quant_method": "gptq"}})
    base = json.dumps({"base_model_name_or_path": "THUDM/GLM-4-9B-0414"})
    checkpoint = make("checkpoint", **{"config.json": "{}", "model.safetensors": "", "training_args.bin": ""})
    bundle = make("bundle", **{"manifest.json": "{}", "model.onnx": ""})
    make(f"hub/{CACHE}/snapshots/c0ffee", **{"config.json": "{}"})
    make("runs/best", **{"config.json": "{}"})
    return {
        "checkpoint": checkpoint,
        "quantized": make("quantized", **{"config.json": quantized, "model.safetensors": ""}),
        "bundle": bundle,
        "engine": make("engine", **{"manifest.json": "{}", "prefill.engine": "", "decode.engine": ""}),
        "adapter": make("adapter", **{"adapter_config.json": base, "adapter_model.safetensors": ""}),
        "gguf": make("gguf", **{"GLM-4-9B-Q4_K_M.gguf": ""}),
        "pickles": make("pickles", **{"config.json": "{}", "pytorch_model-00001-of-00002.bin": ""}),
        "graph": make("graph", **{"genai_config.json": "{}", "model.onnx": ""}),
        "weights file": checkpoint / "model.safetensors",
        "bundle file": bundle / "model.onnx",
        "file": make("plain", file="x") / "file",
        "cached": tmp_path / "hub" / CACHE,
        "cache": tmp_path / "hub",
        "around": tmp_path / "runs",
        "other": make("empty"),
    }


# What is said where a checkpoint, and where a bundle, is wanted; None: nothing.
SAID = {
    "checkpoint": (None, "is a checkpoint, not a bundle; make a bundle of it: glm4-deploy export {} BUNDLE"),
    "quantized": (None, "is a checkpoint that gptq quantized, not a bundle; make a bundle of it"),
    "bundle": ("is a bundle, not a checkpoint; give the checkpoint that it was made from", None),
    "engine": ("is a bundle with a TensorRT engine, not a checkpoint; give the checkpoint", None),
    "adapter": (
        "is an adapter, not a checkpoint; export its base model THUDM/GLM-4-9B-0414 with --lora ",
        "is an adapter, not a bundle; export its base model THUDM/GLM-4-9B-0414 with --lora ",
    ),
    "gguf": ("is GGUF (GLM-4-9B-Q4_K_M.gguf), not a checkpoint; give the checkpoint", "not a bundle; give the checkpoint"),
    "pickles": ("can run code when it is read, not a checkpoint; convert it", "not a bundle; convert it"),
    "graph": ("is an ONNX graph of another tool (model.onnx), not a checkpoint", "not a bundle; give the checkpoint"),
    "weights file": ("give its folder, ", "give its folder, "),
    "bundle file": ("is a file of a bundle, not a checkpoint", "is a file of a bundle, not a bundle; give its folder, "),
    "file": ("is a file; give the folder that holds it and config.json", "is a file; give a bundle's folder"),
    "cached": ("is a folder of a hub's cache", "c0ffee"),
    "cache": ("is a hub's cache, not a checkpoint; give a checkpoint in it, as ", f"{CACHE}/snapshots/COMMIT"),
    "around": ("is a folder around others, not a checkpoint; give the one in it, ", "runs/best"),
    "other": ("is neither a bundle (no manifest.json) nor a checkpoint (no config.json)", "give a bundle's folder"),
}  # fmt: skip


def test_every_kind_is_known(things):
    assert things.keys() == FOLDER_KINDS.keys() == SAID.keys()
    assert {name: kind_of(path)[0] for name, path in things.items()} == {name: name for name in FOLDER_KINDS}


@pytest.mark.parametrize("kind", FOLDER_KINDS)
def test_what_is_said(things, kind):
    path = things[kind]
    for require, said in zip((require_checkpoint, require_bundle), SAID[kind], strict=True):
        if said is None:
            require(path)
            continue
        with pytest.raises(Glm4Error) as refused:
            require(path)
        assert said.format(path) in str(refused.value)
        assert str(refused.value).startswith(f"{path} is ")
        assert len(str(refused.value)) < 500
        assert "{" not in str(refused.value)
    if None in SAID[kind]:
        assert require_either(path) == kind


@pytest.mark.parametrize("kind", [k for k in FOLDER_KINDS if k not in ("checkpoint", "quantized")])
def test_commands_that_want_a_checkpoint(run, things, tiny_checkpoint, tmp_path, kind):
    for arguments in (("export", things[kind], tmp_path / "new"), ("export", things[kind], "--print-key")):
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert SAID[kind][0] in err
    if kind not in ("bundle", "engine"):
        code, out, err = run("inspect", things[kind])
        assert (code, out, err.count("\n")) == (1, "", 1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["checkpoint", "adapter", "gguf", "pickles", "cached", "bundle file"])
def test_commands_that_want_a_bundle(run, things, kind):
    path = things[kind]
    for arguments in (("generate", path, "x"), ("chat", path), ("serve", path), ("bench", path)):
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert SAID[kind][1].format(path) in err
    code, _, err = run("validate", path, "--reference", things["checkpoint"])
    assert (code, err.count("\n")) == (1, 1)
    assert SAID[kind][1].format(path) in err


def test_validate_wants_a_bundle_and_a_checkpoint_not_the_other_way(run, tiny_bundles, tiny_checkpoint):
    code, _, err = run("validate", tiny_bundles["ort"], "--reference", tiny_bundles["ort"])
    assert code == 1
    assert "is a bundle, not a checkpoint" in err
    code, _, err = run(
        "validate", tiny_bundles["ort"], "--reference", tiny_checkpoint, "--against", tiny_checkpoint
    )
    assert code == 1
    assert "is a checkpoint, not a bundle" in err


def test_names_that_are_nothing(run, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path / ("x" * 300)):
        assert kind_of(path) == ("nothing", "")
        code, _, err = run("generate", path, "x")
        assert (code, err.count("\n")) == (1, 1)
        assert "is not a bundle (no such folder); make one with: glm4-deploy export CHECKPOINT BUNDLE" in err


def test_damaged_files_are_left_to_whoever_reads_them(tmp_path):
    for name, text in (("config.json", "{"), ("config.json", "[" * 100_000), ("manifest.json", "\xff")):
        (tmp_path / name).write_text(text, "latin-1")
        assert kind_of(tmp_path)[0] == ("checkpoint" if name == "config.json" else "bundle")
        (tmp_path / name).unlink()


def test_a_classifier_writes_no_text(run, tiny_bundles, monkeypatch):
    task = SimpleNamespace(task="sequence-classification")
    monkeypatch.setattr(folders, "read_manifest", lambda _: task)
    for arguments in (("chat", tiny_bundles["ort"]), ("generate", tiny_bundles["ort"], "x")):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "")
        assert "is for sequence-classification and writes no text; use it in Python" in err


def test_validate_without_onnx_is_one_line(run, tiny_bundles, tiny_checkpoint, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("glm4_deploy.validate")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in [name for name in sys.modules if name.startswith("glm4_exporters.pieces")]:
        monkeypatch.delitem(sys.modules, name)
    code, out, err = run("validate", tiny_bundles["ort"], "--reference", tiny_checkpoint)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.search(r"validate needs onnx; run .*pip install .*\[cpu,export\]", err)


NOT_UTF8 = "b\udcff\udcfe"  # as Python reads such bytes


def test_names_that_are_not_utf8_are_one_line(run, tmp_path, demo_bundle, tiny_checkpoint):
    """Whatever opens a bundle refuses the name; what only reads files takes it."""
    bundle, checkpoint = tmp_path / NOT_UTF8, tmp_path / f"checkpoint{NOT_UTF8}"
    shutil.copytree(demo_bundle, bundle)
    shutil.copytree(tiny_checkpoint, checkpoint)
    for arguments in (
        ("generate", bundle, "x"),
        ("chat", bundle),
        ("serve", bundle, "--port", 0),
    ):
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert "is not UTF-8 text, as the runtimes need it; rename the folder" in err
    assert [inspect(path)["kind"] for path in (bundle, checkpoint)] == ["bundle", "checkpoint"]
    for command in ("generate", "serve", "inspect", "validate"):
        options = {"generate": ["x"], "validate": ["--reference", tiny_checkpoint]}.get(command, [])
        code, out, err = run(command, tmp_path / f"nothing{NOT_UTF8}", *options)
        assert (code, out, err.count("\n")) == (1, "", 1), err
    assert run("bench-serve", f"http://127.0.0.1:9/{NOT_UTF8}")[0] == 2


def test_a_tokenizer_in_a_folder_whose_name_is_not_utf8(tmp_path, demo_bundle):
    folder = tmp_path / NOT_UTF8
    folder.mkdir()
    shutil.copyfile(demo_bundle / "tokenizer.json", folder / "tokenizer.json")
    assert Tokenizer.from_folder(folder).vocab_size == 2048


def test_an_output_that_cannot_be_made_is_refused_before_the_work(tiny_bundles, tiny_checkpoint, run):
    arguments = ("--reference", tiny_checkpoint, "--html", "/proc/x/y.html")
    code, _, error = run("validate", tiny_bundles["ort"], *arguments)
    assert code == 1
    assert "/proc/x/y.html cannot be written" in error
    assert "compare" not in error


@pytest.mark.parametrize("path", ["x" * 300, "y/" * 3000 + "z"])
def test_paths_that_the_system_refuses_are_one_line(
    tiny_bundles, tiny_checkpoint, tmp_path, run, path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    bundle = tiny_bundles["ort"]
    for command in (
        ("inspect", path),
        ("export", path, "out"),
        ("export", tiny_checkpoint, path),
        ("export", tiny_checkpoint, "out", "--lora", path),
        ("serve", path),
        ("generate", path, "x"),
        ("chat", path),
        ("bench", path),
        ("validate", path, "--reference", tiny_checkpoint),
        ("validate", bundle, "--reference", path),
        ("validate", bundle, "--reference", tiny_checkpoint, "--html", path),
        ("triton", bundle, path),
        ("eval", path),
    ):
        code, _, error = run(*command)
        assert code == 1, command
        assert len(error.splitlines()) == 1, error
        assert len(error) <= 520
    assert list(tmp_path.iterdir()) == []
