"""Exports of checkpoints that other tools quantized."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from glm4_deploy.cli import cli
from glm4_deploy.inspect import inspect
from glm4_deploy.pipeline import ExportOptions, cache_key, export

DATA = Path(__file__).parents[1] / "data" / "quantized"


@pytest.mark.parametrize("folder", ["gptq-4-act-order", "awq-4", "compressed-tensors-fp8-block"])
def test_requantized_from_the_values(tmp_path, folder):
    """Parity's reference is the quantized checkpoint: of the original it would be 10 % away."""
    result = export(DATA / folder, tmp_path / "b", ExportOptions(target="native", precision="fp32"))
    assert result.parity.max_abs_error < 1e-5
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert (
        report["source"]["method"]
        == {"gptq": "GPTQ", "awq-": "AWQ", "comp": "compressed-tensors"}[folder[:4]]
    )
    assert report["source"]["stored"].startswith("requantized to fp32")


def test_inspect_says_what_is_quantized():
    found = inspect(DATA / "compressed-tensors-w8a8-static")["quantization"]
    assert found == {
        "method": "compressed-tensors",
        "matrices": {"int8, a scale per row, bfloat16 scales": 12},
        "left": ["model.embed_tokens", "lm_head"],
        "input_scales": 12,
    }
    said = CliRunner().invoke(cli, ["inspect", str(DATA / "gptq-4-asym")]).output
    assert "GPTQ: 14 of int4, groups of 32, zero points, float16 scales" in said
    assert "model.embed_tokens, lm_head" in said
    assert inspect(DATA / "original")["quantization"] is None


def test_the_cache_key_knows_the_quantization(tmp_path):
    keys = {
        cache_key(DATA / folder, ExportOptions(precision="int8"))
        for folder in ("gptq-4", "gptq-8", "original")
    }
    assert len(keys) == 3
