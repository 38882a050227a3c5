"""Validate a bundle of a quantized checkpoint, with the original of the checkpoint beside."""

import json
from pathlib import Path

import pytest
from adapters import write_adapter
from checkpoints import tiny_config, write_checkpoint
from click.testing import CliRunner

from glm4_deploy.cli import cli
from glm4_deploy.pipeline import ExportOptions, export
from glm4_deploy.validate import ValidateOptions, validate
from glm4_runtime.errors import RequestError

DATA = Path(__file__).parents[1] / "data" / "quantized"
ORIGINAL, QUANTIZED = DATA / "original", DATA / "compressed-tensors-w4a16-asym"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    bundle = tmp_path_factory.mktemp("kept") / "bundle"
    export(QUANTIZED, bundle, ExportOptions(target="native", parity=False))
    return bundle


def measured(bundle, reference, original):
    options = ValidateOptions(against=original, gate=None, max_tokens=256, length=64, greedy=False)
    return validate(bundle, reference, options)


def test_the_loss_of_the_quantization_and_of_the_export(kept):
    """A bundle that keeps the numbers loses nothing: the whole loss is the quantization's."""
    found = measured(kept, QUANTIZED, ORIGINAL).losses
    assert found["metric"] == "kl_mean"
    assert found["export"] < 1e-9
    assert found["quantization"] > 1e-3
    assert found["both"] == pytest.approx(found["quantization"], rel=1e-3)


def test_an_export_that_loses_more_than_the_quantization(tmp_path):
    """int8 numbers that the export rounds to 4 bits again."""
    reference = DATA / "compressed-tensors-w8a16"
    export(reference, tmp_path / "b", ExportOptions(target="native", precision="int4", parity=False))
    found = measured(tmp_path / "b", reference, ORIGINAL).losses
    assert found["export"] > 10 * found["quantization"] > 0


def test_adapters_are_merged_into_both_checkpoints(tmp_path):
    """Otherwise the adapter's whole effect would count as the quantization's loss."""
    adapter = write_adapter(ORIGINAL, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    adapters, bundle = ((str(adapter), 1.0),), tmp_path / "b"
    export(QUANTIZED, bundle, ExportOptions("native", "fp16", parity=False, adapters=adapters))
    options = {"gate": None, "max_tokens": 256, "length": 64, "greedy": False, "against": ORIGINAL}
    found = validate(bundle, QUANTIZED, ValidateOptions(**options, adapters=adapters)).losses
    plain = export(QUANTIZED, tmp_path / "plain", ExportOptions("native", "fp16", parity=False)).bundle
    without = validate(plain, QUANTIZED, ValidateOptions(**options)).losses
    assert found["quantization"] == pytest.approx(without["quantization"], rel=0.5)


def test_the_command_says_whose_loss_is_whose(kept):
    asked = ["validate", str(kept), "--reference", str(QUANTIZED), "--against", str(ORIGINAL), "--no-greedy"]
    asked += ["--max-tokens", "128", "--length", "64"]
    said = CliRunner().invoke(cli, asked)
    assert said.exit_code == 0, said.output
    assert "kl_mean: the quantization of the checkpoint loses" in said.output
    assert "reference compared with original" in said.output
    report = json.loads(CliRunner().invoke(cli, [*asked, "--json"]).stdout)
    assert report["against"]["name"] == "original"
    assert [(each["expected"], each["actual"]) for each in report["comparisons"]] == [
        ("reference", "bundle"), ("original", "reference"), ("original", "bundle"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "original", "said"),
    [
        (QUANTIZED, DATA / "gptq-4", "gptq-4 is quantized too; give --against the checkpoint before"),
        (QUANTIZED, None, "is another model than"),
        (ORIGINAL, ORIGINAL, "only if the reference is quantized"),
    ],
)
def test_what_is_no_original(kept, tmp_path, reference, original, said):
    other = original or write_checkpoint(tmp_path / "other", tiny_config())
    with pytest.raises(RequestError, match=said):
        measured(kept, reference, other)
