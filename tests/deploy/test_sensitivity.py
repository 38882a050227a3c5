"""validate --sensitivity: the matrix that matters most comes first, and the recipe spares it."""

import json
import shutil
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from glm4_deploy.cli import cli
from glm4_deploy.pipeline import ExportOptions, export
from glm4_deploy.validate.sensitivity import rank_tensors
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.quantize.recipe import read_recipe
from glm4_exporters.targets import RECIPE_FORMATS
from glm4_runtime.errors import RequestError

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
FRAGILE = "model.layers.2.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def fragile_checkpoint(tmp_path_factory):
    """The demo with one matrix whose blocks each hold an outlier: what int4 rounds worst."""
    folder = shutil.copytree(DEMO, tmp_path_factory.mktemp("fragile") / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    tensors[FRAGILE][:, ::32] *= 24
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_fragile_matrix_leads_and_is_spared(tmp_path, fragile_checkpoint):
    bundle = tmp_path / "bundle"
    export(fragile_checkpoint, bundle, ExportOptions(precision="int4", parity=False))
    recipe = tmp_path / "recipe.toml"
    arguments = ["validate", bundle, "--reference", fragile_checkpoint, "--max-tokens", "256", "--no-gate"]
    arguments += ["--no-greedy", "--sensitivity", recipe, "--bits", "4.8", "--json"]
    result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    ranking = json.loads(result.stdout)["sensitivity"]["tensors"]
    assert ranking[0]["name"] == FRAGILE
    assert ranking[0]["scheme"] == "int8"
    assert len(ranking) == 26
    formats = read_recipe(recipe, RECIPE_FORMATS)
    sizes = {row["name"]: row["elements"] for row in ranking}
    bits = {name: {"int8": 8.125, "int4": 4.5}[str(formats.format_of(name))] for name in sizes}
    assert sum(bits[n] * sizes[n] for n in sizes) / sum(sizes.values()) <= 4.8
    for target in ("ort", "native"):
        options = ExportOptions(target=target, precision="int4", recipe=str(recipe), parity=False)
        made = export(fragile_checkpoint, tmp_path / target, options).bundle
        model = onnx.load(made / "model.onnx", load_external_data=False)
        codes = next(t for t in model.graph.initializer if t.name == f"{FRAGILE}.codes")
        assert codes.data_type == {"ort": onnx.TensorProto.UINT8, "native": onnx.TensorProto.INT8}[target]


@pytest.mark.parametrize("bits", [4.4, 8.2, 0.0])
def test_bits_that_no_mixture_has_are_refused_before_the_work(bits):
    with (
        Checkpoint.load(DEMO) as checkpoint,
        pytest.raises(RequestError, match=r"int4 takes 4.5 and int8 8.125"),
    ):
        rank_tensors(checkpoint, mean_bits=bits)


def test_bits_without_a_recipe_are_wrong_usage():
    result = CliRunner().invoke(cli, ["validate", "b", "--reference", str(DEMO), "--bits", "5"])
    assert result.exit_code == 2
    assert "--bits needs --sensitivity" in result.output
