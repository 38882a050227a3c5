"""What calibration decides fits together: fp16's remedy, AWQ, GPTQ, SmoothQuant, recipes and cache scales in every mix.

An edit is exact: without rounding, the edited model computes what the checkpoint does. Scales belong to the edited
model: an input scale to the input that the edited model gives, a cache scale to its keys and values.
"""

import itertools
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checkpoints import random_tensors, tiny_config, write_checkpoint
from edited_models import edited_model
from safetensors.torch import load_file, save_file

from glm4_deploy.calibration import CalibrationText, prepare
from glm4_deploy.pipeline import ExportOptions, export
from glm4_deploy.validate import ValidateOptions, validate
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.form import choose_form
from glm4_exporters.quantize.calibrate import calibrate
from glm4_exporters.quantize.kv_cache import INT8_MAX, MARGIN
from glm4_exporters.quantize.recipe import Recipe, write_recipe
from glm4_exporters.quantize.static import SHARES
from glm4_exporters.streamed import reference_outputs

pytestmark = pytest.mark.usefixtures("traced_once")

SEQUENCES = [np.random.default_rng(n).integers(0, 320, 48).tolist() for n in range(4)]
BITS = 14
DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"

# Where the remedy has to act: the rows that are raised by 2^14.
HOT = {"": (), "v": ("v",), "up": ("up",), "o_proj": ("o_proj",), "down": ("down",), "all": ("v", "up", "o_proj", "down")}  # fmt: skip
ONE_SITE = {"*.q_proj.weight": "int4", "*.k_proj.weight": "int8-sq", "*.v_proj.weight": "int8"}
# A precision, and formats of single matrices.
WEIGHTS = {
    "int8": ("int8", {}),
    "AWQ and GPTQ": ("int4", {}),
    "SmoothQuant": ("int8-sq", {}),
    "AWQ by a recipe": ("int8", {"*.1.self_attn.o_proj.weight": "int4", "*.0.mlp.*": "int4-fine"}),
    "SmoothQuant by a recipe": ("int8", {"*.o_proj.weight": "int8-sq", "*.1.mlp.down_proj.weight": "int8-sq"}),
    "AWQ and SmoothQuant on one site": ("int8", ONE_SITE),
    "AWQ around SmoothQuant": ("int4", {"*.v_proj.weight": "int8-sq", "*.gate_up_proj.weight": "int8-sq"}),
    "SmoothQuant around AWQ": ("int8-sq", {"*.o_proj.weight": "int4", "*.down_proj.weight": "int4-wide"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A function that gives the checkpoint whose values are raised in some places, in both layers."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(hot):
        if hot not in made:
            config = tiny_config()
            made[hot] = write_checkpoint(folder / (hot or "plain"), config)
            tensors = random_tensors(Glm4Config.from_dict(config), "causal-lm", torch.float32, seed=0)
            for layer, place in itertools.product((0, 1), HOT[hot]):
                _raise(tensors, f"model.layers.{layer}.", place)
            save_file(tensors, made[hot] / "model.safetensors")
        return made[hot]

    return make


def _raise(tensors, scope, place):
    if place == "up":
        tensors[f"{scope}mlp.gate_up_proj.weight"][96:] *= 2.0**BITS
        return
    matrix = {"v": "self_attn.v_proj", "o_proj": "self_attn.o_proj", "down": "mlp.down_proj"}[place]
    for kind in ("weight", "bias"):
        if f"{scope}{matrix}.{kind}" in tensors:
            tensors[f"{scope}{matrix}.{kind}"] *= 2.0**BITS


def form_of(config, weights, activations, cache):
    precision, formats = WEIGHTS[weights]
    recipe = Recipe(formats) if formats else None
    return choose_form(config, "causal-lm", "native", precision, activations, recipe).with_cache(cache)


MIXES = [
    pytest.param(*mix, marks=() if mix[1:] == ("all", "int8") else pytest.mark.more)
    for mix in itertools.product(WEIGHTS, HOT, (None, "int8"))
]  # all at once holds every pair


@pytest.mark.parametrize(("weights", "hot", "cache"), MIXES)
def test_every_mix_is_exact_and_its_scales_fit(tmp_path, checkpoints, weights, hot, cache):
    with Checkpoint.load(checkpoints(hot)) as checkpoint:
        form = form_of(checkpoint.config, weights, "fp16", cache)
        prepared = prepare(checkpoint, form, CalibrationText(SEQUENCES, "test"))
        assert bool(prepared.norm_bits) == bool(hot)
        smoothing = prepared.edits.smoothing
        model = edited_model(checkpoint, smoothing, prepared.norm_bits)
        expected = np.concatenate(reference_outputs(checkpoint, SEQUENCES))
        with torch.inference_mode():
            found = np.concatenate([model(torch.tensor([ids])).logits[0].numpy() for ids in SEQUENCES])
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
        seen = measured(tmp_path, checkpoint, model, prepared.norm_bits)
        require_fitting_inputs(form, prepared, seen)
        if cache:
            require_fitting_cache(prepared, seen)
        require_near(prepared, form, model)


def measured(folder, checkpoint, model, norm_bits):
    """Statistics of the edited model on the same text; it is written as a checkpoint, with one eps for all norms."""
    tensors = dict(model.state_dict())
    for norm, k in norm_bits.items():  # what the norm reads, as large as its eps wants it
        matrix = {"post_self_attn_layernorm": "self_attn.o_proj", "post_mlp_layernorm": "mlp.down_proj"}
        scope, _, name = norm.rpartition(".")
        tensors[f"{scope}.{matrix[name]}.weight"] = tensors[f"{scope}.{matrix[name]}.weight"] * 2.0**k
    copy = write_checkpoint(folder / "edited", tiny_config())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, copy / "model.safetensors")
    with Checkpoint.load(copy) as edited:
        return calibrate(edited, SEQUENCES)


def require_fitting_inputs(form, prepared, seen):
    """The largest integer stands at a share of the largest input that the edited model gives."""
    assert prepared.input_scales.keys() == form.rounded_inputs.keys()
    for name, step in prepared.input_scales.items():
        share = 127 * step / float(seen.input_of(name).absmax.max())
        assert min(abs(share / one - 1) for one in SHARES) < 1e-3, (name, share)


def require_fitting_cache(prepared, seen):
    """Keys and values of every head reach LEVELS / MARGIN steps, none more."""
    for scales, layer in zip(prepared.cache_scales, seen.layers, strict=True):
        for scale, largest in ((scales.key, layer.key_radius), (scales.value, layer.value_absmax)):
            steps = largest / scale
            assert steps.max() == pytest.approx(INT8_MAX / MARGIN, rel=1e-3)
            assert np.median(steps) == pytest.approx(INT8_MAX / MARGIN, rel=1e-3)


def require_near(prepared, form, model):
    """GPTQ's codes stand for the edited model's matrices."""
    weights = model.state_dict()
    for name, found in prepared.edits.found.items():
        weight = weights[name]
        values = form.formats[name].decode(found.rows(0, len(weight)), weight.shape[1])
        assert (values - weight).norm() < 0.35 * weight.norm(), name


EXPORTED = [
    ("ort", "fp16", "AWQ and GPTQ", "all", "auto"),
    ("ort", "fp16", "int8", "v", "auto"),
    ("native", "fp16", "int8", "up", "auto"),
    ("native", "fp16", "SmoothQuant", "all", "auto"),
    ("native", "fp16", "AWQ and SmoothQuant on one site", "all", "auto"),
    ("ort", "fp32", "AWQ by a recipe", "", "auto"),
    ("ort", "fp32", "SmoothQuant around AWQ", "", "int8"),
    ("ort", "fp32", "AWQ around SmoothQuant", "", "int8"),
]
ALL = [
    *itertools.product(["native"], ["fp16"], WEIGHTS, HOT, ["auto"]),
    *itertools.product(["ort", "native"], ["fp32"], WEIGHTS, [""], ["auto"]),
    *itertools.product(["ort"], ["fp32"], WEIGHTS, [""], ["int8"]),
    *itertools.product(["ort"], ["fp16"], ["int8", "AWQ and GPTQ", "AWQ by a recipe"], HOT, ["auto"]),
]


@pytest.mark.parametrize(
    ("target", "activations", "weights", "hot", "cache"),
    [*EXPORTED, *(pytest.param(*one, marks=pytest.mark.more) for one in ALL if one not in EXPORTED)],
)
def test_validate_blames_no_sub_block_of_any_mix(
    tmp_path, checkpoints, target, activations, weights, hot, cache
):
    precision, formats = WEIGHTS[weights]
    text, recipe = tmp_path / "text.ids", tmp_path / "recipe.toml"
    text.write_text("\n".join(" ".join(map(str, ids)) for ids in SEQUENCES))
    if formats:
        write_recipe(recipe, Recipe(formats))
    options = ExportOptions(
        target, precision, activations=activations, kv_cache=cache, parity=False,
        calibration=str(text), recipe=str(recipe) if formats else None,
    )  # fmt: skip
    if weights == "int8" and cache == "auto":
        options = ExportOptions(target, precision, activations=activations, parity=False)
    bundle = export(checkpoints(hot), tmp_path / "bundle", options).bundle
    report = validate(
        bundle, checkpoints(hot), ValidateOptions(text=text, layers=True, gate=None, greedy=False)
    )
    assert report.culprit is None, report.culprit
    assert report.out_of_band == []
    assert len(report.blocks) == 12 * 2 + 3
    assert all(block.local is not None and not block.covers for block in report.blocks)


@pytest.fixture(scope="module")
def scaled_bundle(tmp_path_factory, checkpoints):
    """int4 in fp16, scaled by AWQ and by the remedy, and the text that it is looked at with."""
    folder = tmp_path_factory.mktemp("scaled")
    text = folder / "text.ids"
    text.write_text("\n".join(" ".join(map(str, ids)) for ids in SEQUENCES))
    options = ExportOptions("ort", "int4", activations="fp16", calibration=str(text), parity=False)
    return export(checkpoints("all"), folder / "bundle", options).bundle, text


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.0.self_attn.v_proj.weight", (0, "v")),
        ("model.layers.1.self_attn.o_proj.weight", (1, "o_proj")),
        ("model.layers.1.mlp.gate_up_proj.weight", (1, "gate_up")),
        ("model.layers.0.post_attention_layernorm.weight", (0, "post_attention_layernorm")),
    ],
)
def test_a_wrong_tensor_is_named_in_a_scaled_bundle(tmp_path, checkpoints, scaled_bundle, name, block):
    """Its rows stand in another order, which no factor per channel explains."""
    bundle, text = scaled_bundle
    other = shutil.copytree(checkpoints("all"), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors[name] = tensors[name].roll(1, 0) + (0 if tensors[name].dim() > 1 else tensors[name])
    save_file(tensors, other / "model.safetensors")
    report = validate(bundle, other, ValidateOptions(text=text, layers=True, gate=None, greedy=False))
    assert (report.culprit.error.layer, report.culprit.error.block) == block
    assert [(one.layer, one.block) for one in report.out_of_band] == [block]


def test_validate_blames_no_sub_block_of_the_calibrated_demo(tmp_path):
    """GPTQ's rounding is as large as some of AWQ's factors there, so that outputs alone would decide by chance."""
    options = ExportOptions("ort", "int4", calibration=str(DEMO.parent / "calibration.jsonl"), parity=False)
    bundle = export(DEMO, tmp_path / "bundle", options).bundle
    report = validate(bundle, DEMO, ValidateOptions(layers=True, gate=None, greedy=False, max_tokens=2048))
    assert (report.culprit, report.out_of_band) == (None, [])


@pytest.mark.more
@pytest.mark.parametrize("size", [1.1, 1.5, 4])
@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.1.input_layernorm.weight", (1, "input_layernorm")),
        ("model.layers.0.post_attention_layernorm.weight", (0, "post_attention_layernorm")),
        ("model.norm.weight", (None, "final_norm")),
    ],
)
def test_a_norm_that_is_wrong_by_a_number_is_named(tmp_path, checkpoints, scaled_bundle, name, block, size):
    bundle, text = scaled_bundle
    other = shutil.copytree(checkpoints("all"), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors[name] = tensors[name] * size
    save_file(tensors, other / "model.safetensors")
    report = validate(bundle, other, ValidateOptions(text=text, layers=True, gate=None, greedy=False))
    assert (report.culprit.error.layer, report.culprit.error.block) == block


@pytest.mark.parametrize("size", [1, 1.5])
def test_a_norm_in_front_of_a_product_with_its_gate(tmp_path, size):
    """Target cpu computes silu(gate) * up in one node, whose product is compared without the gate."""
    source = write_checkpoint(tmp_path / "source", tiny_config(intermediate_size=128))
    text = tmp_path / "text.ids"
    text.write_text("\n".join(" ".join(map(str, ids)) for ids in SEQUENCES))
    options = ExportOptions("cpu", "int4", calibration=str(text), parity=False)
    bundle = export(source, tmp_path / "bundle", options).bundle
    nodes = onnx.load(bundle / "model.onnx", load_external_data=False).graph.node
    assert any(one.name == "gated" and one.i for node in nodes for one in node.attribute)
    tensors, name = load_file(source / "model.safetensors"), "model.layers.0.post_attention_layernorm.weight"
    save_file(tensors | {name: tensors[name] * size}, source / "model.safetensors")
    report = validate(bundle, source, ValidateOptions(text=text, layers=True, gate=None, greedy=False))
    named = [(one.layer, one.block) for one in report.out_of_band]
    assert named == ([] if size == 1 else [(0, "post_attention_layernorm")])
