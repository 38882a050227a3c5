"""Validate: its numbers are those of the whole models, its gates judge them, and what cannot work is refused."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from bundles import rehash
from checkpoints import tiny_config, write_checkpoint
from click.testing import CliRunner
from fake_tensorrt import make_engine_bundle

from glm4_deploy import cli
from glm4_deploy.metrics import kl_divergence, log_softmax
from glm4_deploy.pipeline import ExportOptions, export
from glm4_deploy.validate import ValidateOptions, memory, validate
from glm4_deploy.validate import text as validate_text
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.engine.profiles import engine_capacity, engine_profiles
from glm4_exporters.task_models import load_model
from glm4_runtime import Session
from glm4_runtime.bundle import read_manifest, write_manifest
from glm4_runtime.errors import BundleError, RequestError, TextError
from glm4_runtime.tokenizer import Tokenizer

SEQUENCES = [list(range(5, 69)), list(range(300, 270, -1)), [7, 8, 9] * 8]


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "text.ids"
    path.write_text("\n".join(" ".join(map(str, row)) for row in SEQUENCES))
    return path


@pytest.fixture(scope="module")
def int8(tmp_path_factory, tiny_checkpoint):
    options = ExportOptions("ort", "int8", parity=False)
    return export(tiny_checkpoint, tmp_path_factory.mktemp("int8") / "bundle", options).bundle


@pytest.fixture(scope="module")
def fp16(tmp_path_factory, tiny_checkpoint):
    options = ExportOptions("ort", "fp16", parity=False)
    return export(tiny_checkpoint, tmp_path_factory.mktemp("fp16") / "bundle", options).bundle


@pytest.fixture(scope="module")
def report(int8, tiny_checkpoint, ids):
    return validate(int8, tiny_checkpoint, ValidateOptions(text=ids, layers=True))


def whole_logits(bundle, checkpoint):
    """Both sides in one go: the reference as a model, the bundle through its session."""
    with Checkpoint.load(checkpoint) as source, torch.inference_mode():
        model = load_model(source)
        expected = [model(torch.tensor([row])).logits[0].numpy() for row in SEQUENCES]
    with Session.open(bundle, max_batch_size=1) as session:
        actual = [np.concatenate(list(session.score(row))) for row in SEQUENCES]
    return expected, actual


def test_the_numbers_are_those_of_the_whole_models(report, int8, tiny_checkpoint):
    expected, actual = whole_logits(int8, tiny_checkpoint)

    def loss(logits):
        log = [log_softmax(x.astype(np.float64)) for x in logits]
        return np.concatenate(
            [-one[np.arange(len(row) - 1), row[1:]] for one, row in zip(log, SEQUENCES, strict=True)]
        )

    one, other = loss(expected), loss(actual)
    kl = np.concatenate([kl_divergence(e, a) for e, a in zip(expected, actual, strict=True)])
    same = np.concatenate([e.argmax(-1) == a.argmax(-1) for e, a in zip(expected, actual, strict=True)])
    comparison = report.comparisons[0]
    assert comparison.predicted_tokens == len(one)
    assert comparison.perplexities[0].value == pytest.approx(math.exp(one.mean()), rel=1e-5)
    assert comparison.perplexities[1].value == pytest.approx(math.exp(other.mean()), rel=1e-4)
    assert comparison.ratio.value == pytest.approx(math.exp((other - one).mean()), rel=1e-4)
    assert comparison.ratio.low < comparison.ratio.value < comparison.ratio.high
    assert comparison.metrics["kl_mean"] == pytest.approx(kl.mean(), rel=0.02)
    assert comparison.metrics["kl_p99"] == pytest.approx(np.quantile(kl, 0.99), rel=0.05)
    assert comparison.metrics["kl_max"] == pytest.approx(kl.max(), rel=0.05)
    ties = comparison.near_ties / len(same)
    assert comparison.metrics["top1_agreement"] == pytest.approx(same.mean() + ties, abs=1 / len(same))
    top = [np.sort(np.argsort(x, -1)[:, -5:], -1) for x in (np.concatenate(expected), np.concatenate(actual))]
    shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*top, strict=True)])
    assert comparison.metrics["top5_agreement"] == pytest.approx(shared, abs=0.005)


def test_chunks_of_positions_change_nothing(report, int8, tiny_checkpoint, ids, monkeypatch):
    from glm4_deploy.validate import side_by_side

    monkeypatch.setattr(side_by_side, "chunk_of_positions", lambda *_: 7)
    other = validate(int8, tiny_checkpoint, ValidateOptions(text=ids, greedy=False))
    for name, value in report.comparisons[0].metrics.items():
        if name in other.comparisons[0].metrics:
            assert other.comparisons[0].metrics[name] == pytest.approx(value, rel=1e-4)


def test_greedy_texts_are_compared_from_their_start(report):
    greedy = report.comparisons[0].greedy
    assert greedy.tokens == 48
    assert len(greedy.common) == 3
    assert all(0 <= count <= 48 for count in greedy.common)
    assert report.comparisons[0].metrics["greedy_prefix"] == np.median(greedy.common) / 48


def test_a_bundle_that_generates_no_numbers_fails_its_gate(int8, tiny_checkpoint, ids, monkeypatch):
    real = Session.decode_block

    def decode_block(self, tokens):
        slots, logits = real(self, tokens)
        return slots, np.full_like(logits, np.nan)

    monkeypatch.setattr(Session, "decode_block", decode_block)
    found = validate(int8, tiny_checkpoint, ValidateOptions(text=ids))
    assert found.comparisons[0].metrics["greedy_prefix"] == 0
    assert any("could not generate" in note for note in found.notes)
    assert found.verdict == "failed"


def test_worst_positions_are_where_the_divergence_is_largest(report):
    kl = np.sort(report.comparisons[0].all_kl)[::-1]
    assert [one.kl for one in report.worst] == pytest.approx(kl[:10].tolist())
    first = report.worst[0]
    row = SEQUENCES[first.sequence]
    assert first.before.split()[-1] == str(row[first.index])
    assert first.follows == (str(row[first.index + 1]) if first.index + 1 < len(row) else None)


def test_two_bundles_are_compared_with_the_checkpoint_and_each_other(int8, fp16, tiny_checkpoint, ids):
    found = validate(int8, tiny_checkpoint, ValidateOptions(text=ids, against=fp16, greedy=False)).comparisons
    assert [(one.actual, one.expected) for one in found] == [
        ("bundle", "reference"), ("against", "reference"), ("bundle", "against"),
    ]  # fmt: skip
    assert [one.precision for one in found] == ["int8", "fp16", "int8"]
    assert found[1].metrics["kl_mean"] < 0.01 * found[0].metrics["kl_mean"]
    assert found[2].metrics["kl_mean"] == pytest.approx(found[0].metrics["kl_mean"], rel=0.1)
    assert found[0].ratio.value == pytest.approx(found[1].ratio.value * found[2].ratio.value)


DEMO = Path(__file__).parents[2] / "demo/glm4-tiny"
CORPUS = Path(validate_text.__file__).with_name(validate_text.CORPUS)


def test_a_text_that_belongs_to_the_checkpoint_is_preferred(demo_bundle):
    found = validate(demo_bundle, DEMO, ValidateOptions(max_tokens=600, length=128, greedy=False))
    assert found.verdict == "passed"
    assert found.next_step is None
    assert found.text == str(DEMO / "heldout.txt")
    assert found.tokens == 600
    assert found.comparisons[0].ratio.value == pytest.approx(1, abs=1e-5)
    # the prefix that the tokenizer puts before every sequence is not predicted
    prefix, sequences = 2, found.sequences
    assert found.comparisons[0].predicted_tokens == 600 - sequences * prefix


def test_a_text_that_the_reference_only_guesses_does_not_judge(demo_quantized, tmp_path):
    options = ValidateOptions(text=CORPUS, max_tokens=600, length=128, greedy=False)
    found = validate(demo_quantized["int8"], DEMO, options)
    reference = found.comparisons[0].perplexities[0].value
    assert reference > 2048  # the vocabulary: what guessing gives
    assert found.verdict == "not judged"
    assert "--text FILE" in found.next_step
    assert any(
        f"perplexity on it is {reference:.0f}, and guessing among 2048" in note for note in found.notes
    )
    judged = {check.metric for check in found.checks if check.judged}
    assert judged == {"relative_error", "blocks_out_of_band"}
    page = tmp_path / "report.html"
    result = run(demo_quantized["int8"], "--reference", DEMO, "--text", CORPUS, "--no-greedy",
                 "--max-tokens", 600, "--length", 128, "--html", page)  # fmt: skip
    assert result.exit_code == 0
    assert "not judged" in page.read_text()
    assert "Next step" in page.read_text()


def test_bytes_that_are_no_text_are_shown_as_bytes():
    tokenizer = Tokenizer.from_folder(DEMO)
    ids = tokenizer.encode("\u4e16", add_special_tokens=False)
    shown = [validate_text.hex_of_bytes(tokenizer.token_of(one)) for one in ids]
    assert " ".join(one.strip("<>") for one in shown) == "E4 B8 96"
    assert validate_text.hex_of_bytes("<|user|>世") == "<|user|>世"


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "encoder"])
def test_other_tasks(tmp_path, ids, task):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_config(), task=task)
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions("native", "fp16", parity=False)).bundle
    found = validate(bundle, checkpoint, ValidateOptions(text=ids, layers=True))
    metrics = found.comparisons[0].metrics
    assert found.verdict == "passed"
    assert found.culprit is None
    assert 1e-6 < metrics["relative_error"] < 5e-3
    assert metrics.get("label_agreement", 1.0) == 1.0
    assert ("cosine" in metrics) == (task == "encoder")
    assert {check.metric for check in found.checks} == {*metrics}

    wrong = write_checkpoint(tmp_path / "other", tiny_config(), task=task, seed=1)
    assert validate(bundle, wrong, ValidateOptions(text=ids)).verdict == "failed"


def test_chance_counts_the_labels_and_not_the_tokens(tmp_path, ids):
    """Three labels of three sequences cannot tell two thirds from a bit more."""
    task, gate = "sequence-classification", tmp_path / "gate.toml"
    source, other = (
        write_checkpoint(tmp_path / str(seed), tiny_config(), task=task, seed=seed) for seed in (0, 1)
    )
    bundle = export(source, tmp_path / "bundle", ExportOptions("native", "fp16", parity=False)).bundle
    found = validate(bundle, other, ValidateOptions(text=ids)).comparisons[0]
    assert found.compared == len(SEQUENCES)
    assert found.metrics["label_agreement"] < 0.9
    gate.write_text(f"[fp16]\nlabel_agreement = {found.metrics['label_agreement'] + 0.15}\n")
    (check,) = validate(bundle, other, ValidateOptions(text=ids, gate=str(gate))).checks
    assert (check.judged, check.passed) == (False, True)


def test_a_file_with_random_in_its_name_is_text(demo_bundle, tmp_path):
    text = shutil.copy(DEMO / "heldout.txt", tmp_path / "random lines.txt")
    options = ValidateOptions(text=Path(text), max_tokens=200, length=100, greedy=False)
    assert not any("do not measure quality" in note for note in validate(demo_bundle, DEMO, options).notes)


# The command --------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.cli, ["validate", *map(str, arguments)])


def test_json_junit_and_html_of_a_pass(tmp_path, int8, fp16, tiny_checkpoint, ids):
    page, junit = tmp_path / "report.html", tmp_path / "junit.xml"
    result = run(int8, "--reference", tiny_checkpoint, "--text", ids, "--against", fp16, "--layers",
                 "--gate", "loose", "--json", "--html", page, "--junit", junit)  # fmt: skip
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["verdict"] == "passed"
    assert data["layers"]["culprit"] is None
    assert {block["arithmetic"] for block in data["layers"]["blocks"]} == {"float32", "int8"}
    suite = ElementTree.parse(junit).getroot()
    assert suite.get("failures") == "0"
    assert len(suite.findall(".//testcase")) == len(data["gate"]["checks"]) == 9
    html = page.read_text()
    assert html.count("<svg") == 4
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="([^"]*)"', html))
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert "@import" not in html
    assert not re.findall(r"url\((?!#)", html)
    assert "<script" not in html


def test_a_failed_gate_names_each_metric_and_exits_with_3(tmp_path, int8, tiny_checkpoint, ids):
    gate, junit = tmp_path / "gate.toml", tmp_path / "junit.xml"
    gate.write_text("[int8]\nkl_mean = 1e-9\ntop1_agreement = 1.01\nperplexity_ratio = 2\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", str(int8), "--reference", str(tiny_checkpoint), "--text", str(ids),
                  "--gate", str(gate), "--no-greedy", "--junit", str(junit)])  # fmt: skip
    assert ended.value.code == 3
    failures = ElementTree.parse(junit).getroot().findall(".//failure")
    assert len(failures) == 2
    assert "kl_mean is" in failures[0].get("message")


@pytest.mark.parametrize(
    "contrary", [["--no-gate", "--gate", "strict"], ["--no-gate", "--junit", "x.xml"], ["--bits", "5"]]
)
def test_options_that_mean_nothing_together_are_refused(int8, tiny_checkpoint, contrary):
    result = CliRunner().invoke(
        cli.cli, ["validate", str(int8), "--reference", str(tiny_checkpoint), *contrary]
    )
    assert result.exit_code == 2
    assert "Error: --" in result.output


def test_what_failed_is_said_line_by_line(tmp_path, int8, tiny_checkpoint, ids, capsys):
    gate = tmp_path / "gate.toml"
    gate.write_text("[int8]\nkl_mean = 1e-9\ntop1_agreement = 1.01\nperplexity_ratio = 2\n")
    with pytest.raises(SystemExit):
        cli.main(["validate", str(int8), "--reference", str(tiny_checkpoint), "--text", str(ids),
                  "--gate", str(gate), "--no-greedy"])  # fmt: skip
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("compare")]
    assert lines[0].startswith("failed: kl_mean is ")
    assert lines[1].startswith("failed: top1_agreement is ")
    assert lines[2].endswith("2 of 3 checks")
    assert len(lines) == 3


def test_numbers_that_are_not_finite_fail(tmp_path, fp16, tiny_checkpoint, ids):
    """NaN is a failed gate, valid JSON and a page, not a crash."""
    broken = shutil.copytree(fp16, tmp_path / "broken")
    import onnx

    graph = onnx.load(broken / "model.onnx", load_external_data=False).graph
    norm = next(tensor for tensor in graph.initializer if tensor.name == "model.norm.weight")
    place = {entry.key: entry.value for entry in norm.external_data}
    with (broken / "model.onnx.data").open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(np.full(4, np.nan, np.float16).tobytes())
    rehash(broken)
    with np.errstate(all="ignore"):
        found = validate(broken, tiny_checkpoint, ValidateOptions(text=ids, layers=True, greedy=False))
    assert found.verdict == "failed"
    assert found.culprit.error.block == "final_norm"
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert data["comparisons"][0]["metrics"]["kl_mean"] is None
    from glm4_deploy.validate.html import html_page

    assert "NaN or infinity" in html_page(found)


# What cannot work ---------------------------------------------------------------------------------


def test_a_comparison_that_does_not_fit_is_refused_before_the_work(int8, tiny_checkpoint, ids, monkeypatch):
    from glm4_deploy.validate import run as run_module

    def walk(*_arguments):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(run_module, "walk", walk)
    options = ValidateOptions(text=ids, memory=100 << 20)
    with pytest.raises(RequestError, match=r"takes 0\.\d GiB at its peak .* 0\.1 GiB may be used; no choice"):
        validate(int8, tiny_checkpoint, options)


def engine_of(folder):
    """The folder as that of an engine with its graph kept."""
    manifest = read_manifest(folder)
    profiles = engine_profiles(manifest.task, manifest.limits, "shared")
    return make_engine_bundle(folder, profiles, engine_capacity(manifest.limits.max_seq_len))


def test_an_engine_without_its_graph_is_refused(tmp_path, int8, tiny_checkpoint):
    folder = engine_of(shutil.copytree(int8, tmp_path / "engine"))
    (folder / "model.onnx").unlink()
    manifest = read_manifest(folder)
    files = {name: entry for name, entry in manifest.files.items() if name != "model.onnx"}
    write_manifest(folder, dataclasses.replace(manifest, files=files))
    with pytest.raises(BundleError, match="engine without the ONNX graph"):
        validate(folder, tiny_checkpoint)


def test_an_engine_runs_as_the_graph_it_was_built_from_and_the_report_says_so(
    tmp_path, tiny_checkpoint, ids, traced_once
):
    options = ExportOptions(target="native", precision="fp16", max_batch_size=2, parity=False)
    export(tiny_checkpoint, tmp_path / "engine", options)
    folder = engine_of(tmp_path / "engine")
    found = validate(folder, tiny_checkpoint, ValidateOptions(text=ids, layers=True))
    assert found.culprit is None
    assert (
        f"{folder} is a tensorrt-rtx engine: validate ran the ONNX graph that it was built from."
        in found.notes
    )
    assert any(note.startswith("Greedy texts of") for note in found.notes)


def test_another_models_checkpoint_is_refused(tmp_path, int8):
    other = write_checkpoint(tmp_path / "other", tiny_config(num_hidden_layers=3, vocab_size=352))
    with pytest.raises(RequestError, match="vocabulary 320 instead of 352, layers 2 instead of 3"):
        validate(int8, other)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(length=1), RequestError, "length is 1"),
        (dict(text="none.ids"), TextError, "none.ids cannot be read"),
        (dict(gate="harsh"), RequestError, "the gates are strict, default, loose"),
    ],
)
def test_options_that_cannot_be(int8, tiny_checkpoint, options, error, says):
    with pytest.raises(error, match=says):
        validate(int8, tiny_checkpoint, ValidateOptions(**options))


def test_without_a_tokenizer_the_text_is_random_and_said_to_be(int8, tiny_checkpoint):
    found = validate(int8, tiny_checkpoint, ValidateOptions(max_tokens=100, length=50, greedy=False))
    assert found.tokens == 100
    assert found.text.startswith("random token ids")
    assert "do not measure quality" in found.notes[0]


def test_progress_ends_at_the_whole(int8, tiny_checkpoint, ids):
    seen = []
    options = ValidateOptions(text=ids, layers=True)
    validate(int8, tiny_checkpoint, options, lambda *step: seen.append(step))
    for stage in ("compare", "generate"):
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1] > 1


def test_memory_is_foreseen_from_shapes():
    """A 9B validates in 8 GiB with every sub-block looked at, a 32B where there is more; without a weight read."""
    from glm4_exporters.config import Glm4Config

    nine = Glm4Config.from_dict(
        tiny_config(
            vocab_size=151552, hidden_size=4096, intermediate_size=13696, num_hidden_layers=40, head_dim=128,
            num_attention_heads=32, num_key_value_heads=2, max_position_embeddings=32768,
        )
    )  # fmt: skip
    work = memory.Work([512] * 8, bundles=1, layers=True)
    assert memory.require_memory(nine, "causal-lm", work, 8 << 30) > 3 << 30
    with pytest.raises(RequestError, match="compare fewer tokens"):
        memory.require_memory(nine, "causal-lm", memory.Work([512] * 80, 1, True), 8 << 30)
    fewer = max(memory.estimate(nine, "causal-lm", memory.Work([512], 1, False)).values())
    assert fewer < memory.require_memory(nine, "causal-lm", work, 8 << 30)


def test_a_forged_graph_is_refused_before_it_runs(run, tmp_path, tiny_bundles, tiny_checkpoint):
    folder = shutil.copytree(tiny_bundles["native"], tmp_path / "forged")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("NonZero", ["input_ids"], ["forged"]))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    code, out, err = run("validate", rehash(folder), "--reference", tiny_checkpoint)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "does not have (ai.onnx.NonZero)" in err
