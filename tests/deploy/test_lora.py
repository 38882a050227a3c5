"""``export --lora``: adapters merged into the bundle, proved against PyTorch, named in the manifest."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from adapters import merged_weights, rewrite, write_adapter
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_runtime import Session
from glm4_runtime.bundle import read_manifest

MATRICES = ["q_proj", "v_proj", "gate_up_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_checkpoint):
    return write_adapter(tiny_checkpoint, tmp_path_factory.mktemp("lora") / "style", target_modules=MATRICES)


@pytest.fixture(scope="module")
def merged_checkpoint(tmp_path_factory, tiny_checkpoint, adapter):
    """The checkpoint as PEFT merges it, for those who would do that by hand."""
    folder = tmp_path_factory.mktemp("lora") / "merged"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "model.safetensors").unlink()
    weights = merged_weights(tiny_checkpoint, [(adapter, 1.0)], torch.float32)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


def logits(bundle, ids):
    with Session.open(bundle) as session:
        return session.prefill(0, ids)


@pytest.mark.parametrize(("target", "precision"), [("native", "fp32"), ("cpu", "int8"), ("ort", "int4")])
def test_the_bundle_is_that_of_the_merged_checkpoint(
    tmp_path, run, tiny_checkpoint, adapter, merged_checkpoint, target, precision
):
    options = ("--target", target, "--precision", precision, "--force")
    code, out, err = run("export", tiny_checkpoint, tmp_path / "one", *options, "--lora", adapter)
    assert code == 0, err
    assert "parity" in out
    assert "style" in out
    assert run("export", merged_checkpoint, tmp_path / "two", *options)[0] == 0
    one, two = (np.fromfile(tmp_path / name / "model.onnx.data", np.uint8) for name in ("one", "two"))
    assert one.size == two.size
    assert np.mean(one != two) < 1e-3  # sums in another order differ in the last bit here and there


def test_the_logits_are_transformers(tmp_path, tiny_checkpoint, adapter, merged_checkpoint):
    bundle = export(
        tiny_checkpoint, tmp_path / "b", ExportOptions("native", "fp32", adapters=((str(adapter), 1.0),))
    ).bundle
    ids = [5, 9, 200, 31, 77]
    model = AutoModelForCausalLM.from_pretrained(merged_checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].numpy()
    assert np.abs(logits(bundle, ids)[-1] - expected).max() < 1e-4


def test_the_manifest_names_the_adapters(tmp_path, tiny_checkpoint, adapter):
    options = ExportOptions(
        precision="fp32", parity=False, adapters=((str(adapter), 0.5), (str(adapter), 1.0))
    )
    manifest = read_manifest(export(tiny_checkpoint, tmp_path / "b", options).bundle)
    assert [(each.name, each.scale) for each in manifest.adapters] == [("style", 0.5), ("style", 1.0)]
    config = (adapter / "adapter_config.json").read_bytes()
    weights = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert manifest.adapters[0].sha256 == hashlib.sha256(config + weights.encode()).hexdigest()


def test_the_cache_key_has_the_adapters_content(tmp_path, tiny_checkpoint, adapter):
    def key(*adapters):
        return cache_key(tiny_checkpoint, ExportOptions(adapters=adapters))

    copy = shutil.copytree(adapter, tmp_path / "a copy")
    other = shutil.copytree(adapter, tmp_path / "other")
    rewrite(other, lora_alpha=9)
    keys = [key(), key((str(adapter), 1.0)), key((str(adapter), 0.5)), key((str(other), 1.0))]
    assert len(set(keys)) == 4
    assert key((str(copy), 1.0)) == keys[1]


def test_print_key_reads_the_option(run, tiny_checkpoint, adapter):
    plain = run("export", tiny_checkpoint, "--print-key")
    merged = run("export", tiny_checkpoint, "--print-key", "--lora", f"{adapter}=0.5")
    assert plain[0] == merged[0] == 0
    assert plain[1] != merged[1]


def test_what_is_refused_leaves_nothing(tmp_path, run, tiny_checkpoint, adapter):
    for value, message in (
        (f"{adapter}=half", "is not a number"),
        (tmp_path / "nowhere", "has no adapter_config.json"),
        (tiny_checkpoint, "has no adapter_config.json"),
    ):
        code, out, err = run("export", tiny_checkpoint, tmp_path / "b", "--lora", value)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message in err
    assert not (tmp_path / "b").exists()


def test_a_folder_with_an_equals_sign_in_its_name(tmp_path, run, tiny_checkpoint, adapter):
    odd = shutil.copytree(adapter, tmp_path / "run=3")
    code, _, err = run(
        "export", tiny_checkpoint, tmp_path / "b", "--precision", "fp32", "--lora", odd, "--json"
    )
    assert code == 0, err
    assert read_manifest(tmp_path / "b").adapters[0].name == "run=3"


@pytest.fixture(scope="module")
def half_merged(tmp_path_factory, tiny_checkpoint, adapter):
    options = ExportOptions("native", "fp32", parity=False, adapters=((str(adapter), 0.5),))
    return export(tiny_checkpoint, tmp_path_factory.mktemp("half") / "b", options).bundle


def test_inspect_and_the_report_name_them(run, half_merged, adapter):
    code, out, _ = run("inspect", half_merged)
    assert code == 0
    assert "style (times 0.5)" in out
    report = json.loads((half_merged / "report.json").read_text())
    assert report["options"]["adapters"] == [[str(adapter), 0.5]]


def test_validate_needs_the_same_adapters(tmp_path, run, tiny_checkpoint, half_merged, adapter):
    options = ("--reference", tiny_checkpoint, "--max-tokens", 64, "--json")
    for given in ((), ("--lora", adapter)):
        code, _, err = run("validate", half_merged, *options, *given)
        assert (code, err.count("\n")) == (1, 1)
        assert "was made with style=0.5; give the reference the same ones by --lora" in err
    code, out, err = run(
        "validate", half_merged, *options, "--lora", f"{adapter}=0.5", "--sensitivity", tmp_path / "r.toml"
    )
    assert code == 0, err
    assert json.loads(out)["comparisons"][0]["metrics"]["kl_mean"] < 1e-6
