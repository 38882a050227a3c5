"""Export and validate have one gate: the same limits, the same words."""

import json
import re
import shutil
from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint

from glm4_deploy.export_gate import judge, require_passed
from glm4_deploy.parity import Parity
from glm4_deploy.pipeline import ExportOptions, export
from glm4_deploy.validate import ValidateOptions, validate
from glm4_deploy.validate.gates import load_gate
from glm4_exporters.config import Glm4Config
from glm4_exporters.form import choose_form
from glm4_exporters.quantize.recipe import Recipe
from glm4_runtime.errors import ExportError, GateError, TextError
from glm4_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
GOOD = Parity(
    positions=225, max_abs_error=0.1, mean_abs_error=0.01, relative_error=1e-3, mean_kl=1e-5, top1_agreement=1.0,
    greedy_tokens=32, greedy_agreement=0, greedy_gap=1.0, arithmetic="as exported", text="heldout.txt",
)  # fmt: skip


class _Made:
    kv_cache, task = "float32", "causal-lm"

    def __init__(self, precision, task="causal-lm"):
        self.precision, self.task = precision, task


@pytest.mark.parametrize(
    ("precision", "changes", "verdict"),
    [
        ("int4", dict(), "passed"),
        ("int4", dict(mean_kl=0.031), "failed"),
        ("int4", dict(mean_kl=0.031, fit_text=False), "not judged"),
        ("int4", dict(relative_error=0.5, fit_text=False), "failed"),
        ("fp8", dict(mean_kl=5.5e-3, top1_agreement=0.932), "passed"),
        ("int8", dict(top1_agreement=0.975), "passed"),  # 1 of 225 below the limit: by chance
        ("int8", dict(top1_agreement=0.93), "failed"),
        ("int8", dict(mean_kl=float("nan"), fit_text=False), "failed"),
    ],
)
def test_an_export_is_judged_by_the_default_gate(precision, changes, verdict):
    found = judge(Parity(**GOOD.as_dict() | changes), _Made(precision))
    assert (found.gate, found.verdict) == (f"default, {precision}", verdict)
    limits = load_gate("default", _Made(precision)).limits
    assert all(check.limit == limits[check.metric] for check in found.checks)
    if verdict != "failed":
        require_passed(found)
        return
    with pytest.raises(GateError, match=f"fails gate default, {precision} on heldout.txt: "):
        require_passed(found)


def test_a_classifier_is_judged_by_its_labels():
    changes = dict(mean_kl=None, top1_agreement=None, label_agreement=0.5)
    found = judge(Parity(**GOOD.as_dict() | changes), _Made("int8", "token-classification"))
    assert [check.metric for check in found.checks if not check.passed] == ["label_agreement"]


def test_export_and_validate_agree_on_the_demo(tmp_path, run):
    """The README's own sequence, but for the target."""
    bundle = tmp_path / "bundle"
    code, out, _ = run("export", DEMO, bundle)
    assert code == 0
    assert "default, int8: passed on heldout.txt" in out
    assert re.search(r"kl_mean \S+ \(at most 0.001\)", out)
    kept = json.loads((bundle / "report.json").read_text())["gate"]
    assert kept["verdict"] == "passed"
    assert {"kl_mean", "top1_agreement"} <= {check["metric"] for check in kept["checks"] if check["judged"]}
    code, out, _ = run(
        "validate", bundle, "--reference", DEMO, "--layers", "--no-greedy", "--max-tokens", 600
    )
    assert code == 0
    assert "default, int8: passed on heldout.txt" in out
    assert re.search(r"kl_mean \S+ \(at most 0.001\)", out)
    assert "every sub-block is in its band" in out


def test_labels_are_reported_at_export_and_random_ids_judge_nothing(tmp_path, run):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(), task="token-classification")
    code, out, _ = run("export", folder, tmp_path / "bundle", "--precision", "fp32")
    assert code == 0
    assert "labels" in out
    assert "not judged on random token ids" in out
    found = validate(tmp_path / "bundle", folder, ValidateOptions(max_tokens=100))
    assert found.verdict == "not judged"
    assert found.at_export["verdict"] == "not judged"


@pytest.mark.parametrize("text", [b"", b"abc \xff"])
def test_a_damaged_text_of_the_checkpoint_is_refused_before_the_work(tmp_path, text):
    folder = shutil.copytree(DEMO, tmp_path / "checkpoint")
    (folder / "heldout.txt").write_bytes(text)
    seen = []
    with pytest.raises(
        TextError, match=r"heldout\.txt .*; export compares on this file: mend it or remove it"
    ):
        export(folder, tmp_path / "bundle", progress=lambda *step: seen.append(step))
    assert seen == []
    options = ExportOptions(precision="fp32", parity=False)
    assert export(folder, tmp_path / "bundle", options).gate is None


@pytest.mark.parametrize("report", ["", "[]", '{"gate": 3}', '{"gate": ' + "[" * 100_000])
def test_a_damaged_report_has_no_verdict_at_export(tmp_path, tiny_bundles, tiny_checkpoint, report):
    bundle = shutil.copytree(tiny_bundles["ort"], tmp_path / "bundle")
    (bundle / "report.json").write_text(report)
    found = validate(bundle, tiny_checkpoint, ValidateOptions(max_tokens=20, length=10, greedy=False))
    assert found.at_export is None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_calibration_that_changes_nothing_is_refused_before_the_work(tmp_path, tiny_checkpoint, precision):
    text = tmp_path / "text.ids"
    text.write_text("1 2 3 4 5 6 7 8")
    options = ExportOptions("native", precision, calibration=str(text))
    with pytest.raises(ExportError, match=f"--calibration changes nothing in a bundle of {precision}"):
        export(tiny_checkpoint, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("precision", "formats", "kept"),
    [("int8", {}, True), ("int8-sq", {}, True), ("int4", {"*.q_proj.weight": "int8-sq"}, True)],
)
def test_the_manifest_keeps_its_line_on_the_other_products_inputs(precision, formats, kept):
    config = Glm4Config.from_dict(tiny_config())
    form = choose_form(config, "causal-lm", "cpu", precision, None, Recipe(formats) if formats else None)
    assert ("inputs of products" in form.groups) == kept


def test_sensitivity_checks_its_options_before_it_measures(
    tmp_path, tiny_bundles, tiny_checkpoint, run, monkeypatch
):
    def never(*_arguments, **_options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("glm4_deploy.validate.sensitivity.measure", never)
    monkeypatch.setattr("glm4_deploy.validate.validate", never)
    arguments = [
        "validate",
        tiny_bundles["ort"],
        "--reference",
        tiny_checkpoint,
        "--sensitivity",
        tmp_path / "r.toml",
    ]
    code, _, said = run(*arguments, "--bits", "20")
    assert (code, "20 bits per weight cannot be" in said) == (1, True)
    monkeypatch.undo()
    monkeypatch.setattr("glm4_deploy.validate.sensitivity.measure", never)
    code, _, said = run(*arguments, "--gate", "harsh")
    assert (code, "there is no gate 'harsh'" in said) == (1, True)


def test_sensitivity_exits_by_the_gate(tmp_path, tiny_bundles, tiny_checkpoint, run):
    gate = tmp_path / "gate.toml"
    gate.write_text("[fp32]\nrelative_error = 1e-12\n")
    recipe = tmp_path / "r.toml"
    code, _, said = run("validate", tiny_bundles["ort"], "--reference", tiny_checkpoint, "--sensitivity", recipe,
                        "--gate", gate, "--max-tokens", 64, "--no-greedy")  # fmt: skip
    assert code == 3
    assert "failed: relative_error" in said
    assert recipe.is_file()


@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_bundle_keeps_the_text_that_it_was_compared_on(tmp_path, run, tokenizer):
    """Before the checkpoint's own text; given by the user as ids, so that it needs no tokenizer."""
    folder = shutil.copytree(DEMO, tmp_path / "checkpoint")
    lines = (DEMO / "heldout.txt").read_text("utf-8").splitlines()[:40]
    ids = [Tokenizer.from_folder(DEMO).encode(line) for line in lines if line]
    given = tmp_path / "mine.ids"
    given.write_text("\n".join(" ".join(map(str, line)) for line in ids))
    if not tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "heldout.txt"):
            (folder / name).unlink()
    options = ("--precision", "fp32", "--text", given)
    code, out, _ = run("export", folder, tmp_path / "bundle", *options)
    assert code == 0
    assert "passed on heldout.ids" in out
    assert (tmp_path / "bundle" / "heldout.ids").read_bytes() == given.read_bytes()
    found = validate(tmp_path / "bundle", folder, ValidateOptions(max_tokens=200, greedy=False))
    assert found.text == str(tmp_path / "bundle" / "heldout.ids")
    assert found.verdict == "passed"

    before = run("export", folder, "--print-key", *options)[1]
    given.write_text(given.read_text() + "\n5 6 7\n")
    assert run("export", folder, "--print-key", *options)[1] != before


def test_a_text_that_cannot_be_kept_is_refused_before_the_work(tmp_path, run):
    large = tmp_path / "large.txt"
    large.write_text("A word.\n" * 2_200_000)
    for text, said in ((large, "larger than 16 MiB"), (tmp_path / "none.txt", "cannot be read")):
        code, _, error = run("export", DEMO, tmp_path / "bundle", "--text", text, "--no-parity")
        assert code == 1
        assert said in error
        assert "trace the model" not in error
