"""doctor and inspect: what they say is so, as text and as JSON."""

import dataclasses
import json
import math
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint
from click.testing import CliRunner
from packaging.requirements import Requirement
from safetensors.torch import load_file

from glm4_deploy import doctor
from glm4_deploy.cli import cli
from glm4_deploy.end_tokens import end_tokens
from glm4_deploy.inspect import inspect
from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_runtime.bundle import FileEntry, ModelInfo, read_manifest, write_manifest
from glm4_runtime.bundle.graph_io import graph_io
from glm4_runtime.errors import Glm4Error
from glm4_runtime.install import install_command, pip_command

ROOT = Path(__file__).parents[2]


def invoked(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def finding(name):
    return next(f for f in doctor.examine()["findings"] if f["name"] == name)


def pretend(monkeypatch, installed=(), missing=(), modules=None):
    """Packages and modules that are there or not, whatever this machine holds."""
    version, find_spec = doctor._version, doctor.find_spec
    modules = {} if modules is None else modules

    def fake_version(name):
        return None if name in missing else "1.2.3" if name in installed else version(name)

    monkeypatch.setattr(doctor, "_version", fake_version)
    monkeypatch.setattr(
        doctor, "find_spec", lambda n: None if modules.get(n) is False else modules.get(n) or find_spec(n)
    )


# doctor -------------------------------------------------------------------------------------------


def test_doctor_in_json():
    facts = json.loads(invoked("doctor", "--json"))
    assert set(facts) == {"python", "platform", "cpus", "packages", "extras", "findings"}
    for entry in facts["findings"]:
        assert set(entry) == {"name", "works", "detail", "advice"}
        assert isinstance(entry["works"], bool)
    assert len({entry["name"] for entry in facts["findings"]}) == len(facts["findings"]) == 8


def test_doctor_in_text_has_a_line_per_finding():
    lines = invoked("doctor").splitlines()
    for entry in doctor.examine()["findings"]:
        mark = "yes" if entry["works"] else "no "
        assert any(line.startswith(f"  {mark}  {entry['name']}: {entry['detail']}") for line in lines)


def test_what_works_here_is_said_to_work():
    import onnxruntime
    import torch

    assert finding("export: targets ort, cpu and native")["works"]
    assert f"torch {torch.__version__}" in finding("export: targets ort, cpu and native")["detail"]
    assert onnxruntime.__version__ in finding("run: ONNX Runtime")["detail"]
    assert "CPUExecutionProvider" in finding("run: ONNX Runtime")["detail"]


def test_both_onnxruntimes_overwrite_each_other(monkeypatch):
    pretend(monkeypatch, installed=("onnxruntime", "onnxruntime-gpu"))
    found = finding("run: ONNX Runtime")
    assert not found["works"]
    assert found["detail"] == "onnxruntime and onnxruntime-gpu are both installed and overwrite each other"
    assert "pip uninstall" in found["advice"]
    assert f"{found['detail']} -> {found['advice']}" in invoked("doctor")


def test_what_is_missing_is_said_with_the_extra_that_brings_it(monkeypatch):
    pretend(monkeypatch, modules=dict.fromkeys(("torch", "onnxscript", "onnxruntime"), False))
    found = finding("export: targets ort, cpu and native")
    assert not found["works"]
    assert found["detail"] == "torch, onnxscript not installed"
    assert "[cpu,export]" in found["advice"]
    pretend(monkeypatch, modules={"uvicorn": False})
    found = finding("run: serving image")
    assert (found["works"], found["detail"]) == (False, "uvicorn not installed")
    pretend(monkeypatch, modules={"onnxruntime": False})
    found = finding("run: ONNX Runtime")
    assert (found["works"], found["detail"]) == (False, "not installed")
    assert "[cpu]" in found["advice"]


def gpu(monkeypatch, answer, capability="8.9"):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")

    def run(command, **options):
        if isinstance(answer, Exception):
            raise answer
        asked = capability if "--query-gpu=compute_cap" in command else answer
        return subprocess.CompletedProcess(command, 0, asked, "")

    monkeypatch.setattr(subprocess, "run", run)


def test_the_cuda_provider(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "no NVIDIA GPU or driver" in finding("run: CUDA provider")["detail"]
    gpu(monkeypatch, "NVIDIA L4, 23034 MiB\n")
    pretend(monkeypatch, missing=("onnxruntime-gpu",))
    found = finding("run: CUDA provider")
    assert not found["works"]
    assert found["detail"] == "NVIDIA L4, 23034 MiB, but onnxruntime-gpu is not installed"
    assert "[cuda]" in found["advice"]
    pretend(monkeypatch, installed=("onnxruntime-gpu",), missing=("onnxruntime",), modules={"cuda": object()})
    monkeypatch.setattr(doctor, "_version", lambda name: "1" if name == "onnxruntime-gpu" else None)
    said = "Failed to load libcudnn.so.9: cannot open shared object file"
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: print(said))
    found = finding("run: CUDA provider")
    assert (found["works"], found["detail"]) == (False, f"NVIDIA L4, 23034 MiB, but {said}")
    assert "[cuda]" in found["advice"]
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    assert finding("run: CUDA provider")["works"]


@pytest.mark.parametrize("missing", ["triton", "tensorrt", "polygraphy"])
def test_full_tensorrt_needs_nvidias_index_and_triton(monkeypatch, missing):
    there = dict.fromkeys(("triton", "tensorrt", "polygraphy"), object())
    pretend(monkeypatch, installed=("tensorrt",), modules=there | {missing: False})
    found = finding("export: target tensorrt")
    assert (found["works"], found["detail"]) == (False, f"{missing} not installed")
    assert "[export,tensorrt]' with NVIDIA's package index as --extra-index-url" in found["advice"]
    pretend(monkeypatch, installed=("tensorrt",), modules=there)
    gpu(monkeypatch, "NVIDIA L4, 23034 MiB\n")
    assert finding("export: target tensorrt")["works"]


@pytest.mark.parametrize(
    ("capability", "packages", "works"),
    [
        ("8.9", ("tensorrt-rtx",), True),
        ("12.1", ("tensorrt-rtx",), True),
        ("9.0", ("tensorrt-rtx",), False),
        ("9.0", ("tensorrt-rtx", "tensorrt"), True),
        ("9.0", ("tensorrt",), True),
    ],
)
def test_rtx_engines_have_no_kernels_for_hopper(monkeypatch, capability, packages, works):
    gpu(monkeypatch, "NVIDIA H100, 81559 MiB\n", capability)
    others = {"tensorrt", "tensorrt-rtx"} - set(packages)
    pretend(monkeypatch, installed=packages, missing=others, modules={"cuda": object()})
    found = finding("run: TensorRT engines")
    assert found["works"] is works
    if not works:
        assert "tensorrt-rtx has no kernels for compute capability 9.0" in found["detail"]
        assert "[export,tensorrt]" in found["advice"]
        assert "--target ort --precision fp16" in found["advice"]


@pytest.mark.parametrize(
    "answer", [subprocess.TimeoutExpired("nvidia-smi", 20), OSError(8, "Exec format error")]
)
def test_a_driver_tool_that_hangs_or_is_broken_does_not_end_doctor(monkeypatch, answer):
    gpu(monkeypatch, answer)
    assert not finding("run: CUDA provider")["works"]


def extra(name):
    return next(entry for entry in doctor.examine()["extras"] if entry["name"] == name)


def test_doctor_knows_every_extra_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    facts = doctor.examine()
    assert [entry["name"] for entry in facts["extras"]] == list(project["optional-dependencies"])
    assert {"numpy", "torch", "uvicorn", "pytest"} <= facts["packages"].keys()
    lines = invoked("doctor").splitlines()
    assert "  yes  extra cpu" in lines
    assert sum(line[5:].strip().startswith("extra ") for line in lines) == len(facts["extras"])


def test_an_extra_that_is_missing_is_said_with_what_installs_it(monkeypatch):
    pretend(monkeypatch, missing=("huggingface-hub", "uvicorn", "fastapi"))
    assert extra("hub") == {
        "name": "hub", "installed": False, "missing": ("huggingface-hub",), "advice": install_command("hub"),
    }  # fmt: skip
    assert f"extra serve: fastapi, uvicorn not installed -> {install_command('serve')}" in invoked("doctor")
    assert extra("cpu")["installed"]


def test_a_package_too_old_for_its_extra_is_missing(monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "1.22.9" if name == "onnx" else version(name))
    assert extra("export")["missing"] == ("onnx>=1.23 (version 1.22.9 is installed)",)


def test_the_extras_of_packages_count_too(monkeypatch):
    """onnxruntime-gpu is useless without the CUDA libraries, which its own extras bring."""
    listed = {
        ("glm4-deploy", "cuda"): ["onnxruntime-gpu[cudnn]>=1.30"], ("onnxruntime-gpu", "cudnn"): ["nvidia-cudnn-cu13"],
    }  # fmt: skip
    monkeypatch.setattr(doctor, "_extra_names", lambda: ["cuda"])
    monkeypatch.setattr(doctor, "requirements_of", lambda *key: [Requirement(r) for r in listed.get(key, ())])
    pretend(monkeypatch, installed=(), missing=("nvidia-cudnn-cu13", "onnxruntime"))
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: "1.32.0" if n == "onnxruntime-gpu" else version(n))
    assert extra("cuda")["missing"] == ("nvidia-cudnn-cu13",)


def test_one_onnxruntime_is_uninstalled_before_the_other_comes(monkeypatch):
    pretend(monkeypatch, installed=("onnxruntime",), missing=("onnxruntime-gpu",))
    assert extra("cuda")["advice"] == f"{pip_command()} uninstall onnxruntime, then {install_command('cuda')}"


def test_doctor_of_a_package_that_is_not_installed(monkeypatch):
    def metadata(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "metadata", metadata)
    assert doctor.examine()["extras"] == []
    assert "extras: not known, as this package is not installed" in invoked("doctor")


# inspect, a checkpoint ----------------------------------------------------------------------------


def test_inspect_a_checkpoint(tiny_checkpoint):
    facts = json.loads(invoked("inspect", tiny_checkpoint, "--json"))
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    count = sum(tensor.numel() for tensor in tensors.values())
    assert facts["kind"] == "checkpoint"
    assert facts["task"] == "causal-lm"
    assert facts["tensors"] == len(tensors)
    assert facts["parameters"] == count
    assert facts["stored_bytes"] == {"float32": 4 * count}
    assert facts["bytes_by_precision"]["fp16 or bf16"] == 2 * count
    # 2 layers, keys and values, 2 heads of 16
    assert facts["kv_bytes_per_token"] == {"fp32": 512, "fp16 or bf16": 256, "int8": 128}
    assert facts["files"] == ["generation_config.json"]
    assert facts["config"]["vocab_size"] == 320
    text = invoked("inspect", tiny_checkpoint)
    assert f"{count:,} in {len(tensors)} tensors" in text
    assert "2 layers, hidden 64, MLP 96, vocabulary 320" in text


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "encoder"])
def test_inspect_counts_every_tasks_parameters(tmp_path, task):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(), task=task, dtype="bfloat16", shards=2)
    facts = inspect(folder)
    with Checkpoint.load(folder) as checkpoint:
        count = sum(math.prod(header.shape) for header in checkpoint.tensors.values())
    assert facts["parameters"] == count
    assert facts["stored_bytes"] == {"bfloat16": 2 * count}
    assert facts["task"] == task


def test_what_fits_is_weights_and_8192_positions_in_90_percent():
    """The 9B: 9.40e9 parameters, 40 KiB of fp16 cache a token."""
    from glm4_deploy.inspect import _fitting, weight_bytes

    config = Glm4Config.from_dict(
        tiny_config(
            hidden_size=4096, num_hidden_layers=40, num_attention_heads=32, head_dim=128, intermediate_size=13696,
            vocab_size=151552,
        )
    )  # fmt: skip
    parameters, kv = 9_400_279_040, 40 * 2 * 2 * 128 * 2
    sizes = weight_bytes(config, "causal-lm")
    assert (sizes["fp32"], sizes["fp16 or bf16"]) == (4 * parameters, 2 * parameters)
    assert sizes["int8"] / parameters == pytest.approx(1.016, abs=5e-4)  # 16 bits of scale for 128 numbers
    assert sizes["int4"] / parameters == pytest.approx(
        0.58, abs=0.03
    )  # 4.5 bits in layers, 8.125 in the head
    assert _fitting(sizes, kv, 8) == ["int4"]
    assert _fitting(sizes, kv, 12) == ["int8", "int4"]
    assert _fitting(sizes, kv, 24) == ["fp16 or bf16", "int8", "int4"]
    assert _fitting(sizes, kv, 48) == ["fp32", "fp16 or bf16", "int8", "int4"]
    exact = (4 * parameters + 8192 * kv) / 0.9 / 2**30
    assert ("fp32" in _fitting(sizes, kv, math.ceil(exact))) is True
    assert ("fp32" in _fitting(sizes, kv, math.floor(exact))) is False


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_sizes_are_those_of_the_file(tiny_checkpoint, tmp_path, precision):
    options = ExportOptions(precision=precision, parity=False)
    stored = export(tiny_checkpoint, tmp_path / "bundle", options).manifest.files["model.onnx.data"].bytes
    said = inspect(tiny_checkpoint)["bytes_by_precision"][precision]
    tables, tensors = 2 * 256 * 4 * 4, 80
    assert said + tables <= stored <= said + tables + tensors * 4096  # each begins at a page


def test_inspect_reads_no_weight(tiny_checkpoint, tiny_bundle, monkeypatch):
    for name in ("read", "row_blocks"):
        monkeypatch.setattr(Checkpoint, name, lambda *_, **__: pytest.fail("a weight was read"))
    inspect(tiny_checkpoint)
    inspect(tiny_bundle)


# inspect, a bundle --------------------------------------------------------------------------------


def test_inspect_a_bundle(tiny_bundles):
    bundle = tiny_bundles["ort"]
    facts = json.loads(invoked("inspect", bundle, "--json"))
    assert facts["kind"] == "bundle"
    listed = facts["manifest"]["files"]
    assert facts["bytes"] == sum((bundle / name).stat().st_size for name in listed)
    assert facts["kv_bytes_per_token"] == 512
    assert facts["manifest"] == json.loads((bundle / "manifest.json").read_text())
    assert facts["report"] == json.loads((bundle / "report.json").read_text())
    text = invoked("inspect", bundle)
    for part in (
        "causal-lm",
        "ort, dialect ort",
        "ai.onnx 24",
        "CPUExecutionProvider",
        "256 positions, 4 slots",
        "input_ids int64 [batch, sequence]",
        "logits float32 [batch, positions, 320]",
        "and 2 more like these",
        "over 225 positions (as exported)",
        facts["manifest"]["source_sha256"],
    ):
        assert part in text


def test_a_bundle_without_its_report_is_still_inspected(edited_manifest):
    bundle = edited_manifest()
    (bundle / "report.json").unlink()
    assert "not recorded" in invoked("inspect", bundle)
    assert inspect(bundle)["report"] is None


def test_a_damaged_report_is_one_line(edited_manifest):
    bundle = edited_manifest()
    for text in ("{", "[" * 100_000, "\xff"):
        (bundle / "report.json").write_text(text, "latin-1")
        with pytest.raises(Glm4Error, match=r"report\.json is damaged"):
            inspect(bundle)


def test_an_encoders_bundle_has_no_cache(edited_manifest):
    model = ModelInfo(320, 64, 2, 4, 2, 16, 256, (1, 2, 3), 0)
    io = dataclasses.asdict(graph_io("encoder", model, ""))
    bundle = edited_manifest(kv_cache=None, task="encoder", pooling="last-token, L2", **io)
    assert inspect(bundle)["kv_bytes_per_token"] is None
    text = invoked("inspect", bundle)
    assert "encoder, pooling last-token, L2" in text
    assert "KV per token" not in text


def test_inspect_says_what_an_opening_checks(edited_manifest):
    bundle = edited_manifest()
    assert inspect(bundle)["checked_at_opening"] == dict.fromkeys(read_manifest(bundle).files, "all")
    assert "each opening checks  SHA-256 of generation_config.json, model.onnx" in invoked("inspect", bundle)
    manifest = read_manifest(bundle)
    entry = FileEntry("1" * 64, 10**10, "2" * 64)
    for sample, says in (
        ("2" * 64, "size and SHA-256 of 64 blocks of 1 MiB of model.onnx.data"),
        (None, "only the size of model.onnx.data: export the bundle again for more"),
    ):
        entry = dataclasses.replace(entry, sample=sample)
        write_manifest(
            bundle, dataclasses.replace(manifest, files={**manifest.files, "model.onnx.data": entry})
        )
        assert f"; {says} (--verify: SHA-256 of all)" in invoked("inspect", bundle)


def test_inspect_of_neither(tmp_path):
    with pytest.raises(Glm4Error, match=r"neither a bundle \(no manifest.json\) nor a checkpoint"):
        inspect(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(Glm4Error, match="is a file"):
        inspect(tmp_path / "file")


def test_inspect_says_which_tokens_end_a_text(tmp_path):
    demo = Path(__file__).parents[2] / "demo" / "glm4-tiny"
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(demo / name, tmp_path)
    assert end_tokens(tmp_path, [2038, 2045, 2047]) == {
        "model": {"2038": "<|endoftext|>", "2045": "<|user|>", "2047": "<|observation|>"},
        "chat": [],
    }
    assert end_tokens(tmp_path, [2038])["chat"] == ["<|user|>", "<|observation|>"]
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    assert end_tokens(tmp_path, [2038, 7]) == {"model": {"2038": "<|endoftext|>", "7": None}, "chat": []}
    (tmp_path / "tokenizer.json").unlink()
    assert end_tokens(tmp_path, [2038]) == {"model": {"2038": None}, "chat": []}
    assert "<|endoftext|> (2038), <|user|> (2045), <|observation|> (2047)" in invoked("inspect", demo)
