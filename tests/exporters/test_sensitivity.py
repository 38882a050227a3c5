"""Losses of single matrices in one walk, against a whole model per matrix; and recipes."""

import numpy as np
import pytest
import torch
from checkpoints import tiny_config, write_checkpoint

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.quantize import sensitivity
from glm4_exporters.quantize.recipe import Recipe, keep_sensitive, read_recipe, write_recipe
from glm4_exporters.quantize.sensitivity import TensorLoss, measure
from glm4_exporters.task_models import Glm4ForCausalLM
from glm4_runtime.errors import ExportError

SEQUENCES = [list(range(5, 40)), list(range(300, 250, -1)), list(range(60, 95)), [7]]
SHAPES = {"bias, untied": {}, "no bias, tied": dict(attention_bias=False, tie_word_embeddings=True)}


def coarse(name, weight):
    """Rounded to fifteen steps per row, down_proj of layer 1 to three."""
    steps = 1 if name == "model.layers.1.mlp.down_proj.weight" else 7
    step = weight.abs().amax(1, keepdim=True) / steps
    return (weight / step).round() * step


def whole_model(checkpoint, changed=None):
    with torch.device("meta"):
        model = Glm4ForCausalLM(checkpoint.config)
    state = {name: checkpoint.read(checkpoint.name_of(name)).float() for name in model.state_dict()}
    if changed is not None:
        # A tied head has two names and is one tensor.
        for name in state:
            if checkpoint.name_of(name) == checkpoint.name_of(changed):
                state[name] = coarse(changed, state[name])
    model.load_state_dict(state, assign=True)
    return model.eval()


@torch.inference_mode()
def log_probabilities(model):
    rows = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in SEQUENCES]
    return torch.cat(rows).double().log_softmax(-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_loss_is_that_of_a_whole_model(tmp_path, shape, monkeypatch):
    monkeypatch.setattr(sensitivity, "ROW_BLOCK", 64 * 10)
    monkeypatch.setattr("glm4_exporters.streamed.LAYER_READ_BYTES", 64 * 4 * 50)  # the head in seven blocks
    checkpoint = Checkpoint.load(write_checkpoint(tmp_path, tiny_config(**SHAPES[shape])))
    events = []
    losses = measure(checkpoint, SEQUENCES, coarse, lambda *event: events.append(event))
    matrices = {name for name, header in checkpoint.tensors.items() if len(header.shape) == 2}
    assert {loss.name for loss in losses} == matrices
    clean = log_probabilities(whole_model(checkpoint))
    for loss in losses:
        changed = log_probabilities(whole_model(checkpoint, loss.name))
        expected = float((clean.exp() * (clean - changed)).sum(-1).mean())
        assert loss.kl == pytest.approx(expected, rel=2e-3), loss.name
        assert loss.elements == np.prod(checkpoint.tensors[loss.name].shape)
    assert [loss.kl_per_element for loss in losses] == sorted(
        (loss.kl_per_element for loss in losses), reverse=True
    )
    assert losses[0].name == "model.layers.1.mlp.down_proj.weight"
    for stage in ("rank tensors", "compare distributions"):
        done = [(at, total) for name, at, total in events if name == stage]
        assert done[-1][0] == done[-1][1]
        assert done == sorted(done)
        assert len(done) > 2


def test_no_change_costs_nothing(tiny_checkpoint):
    losses = measure(Checkpoint.load(tiny_checkpoint), SEQUENCES, lambda _name, weight: weight)
    assert all(abs(loss.kl) < 1e-13 for loss in losses)  # float32 sums in another order


def test_another_task_has_no_distribution(tmp_path):
    folder = write_checkpoint(tmp_path, tiny_config(), task="encoder")
    with pytest.raises(ExportError, match="encoder"):
        measure(Checkpoint.load(folder), SEQUENCES, coarse)


def test_streams_that_do_not_fit_are_refused(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(sensitivity.shutil, "disk_usage", lambda _folder: type("", (), {"free": 10}))
    with pytest.raises(ExportError, match="set TMPDIR"):
        measure(Checkpoint.load(tiny_checkpoint), SEQUENCES, coarse)


# ------------------------------------------------------------------------------------------ recipes

LOSSES = [TensorLoss("a", 0.5, 100), TensorLoss("b", 0.4, 10), TensorLoss("c", 0.001, 100)]
LOW, HIGH = ("int4", 4.5), ("int8", 8.5)


@pytest.mark.parametrize(
    ("mean_bits", "kept"), [(4.5, set()), (4.7, {"b"}), (6.6, {"a", "b"}), (8.5, {"a", "b", "c"})]
)
def test_what_loses_most_per_bit_is_kept(mean_bits, kept):
    recipe = keep_sensitive(LOSSES, LOW, HIGH, mean_bits)
    assert {name for name, form in recipe.formats.items() if form == "int8"} == kept
    bits = sum({"int4": 4.5, "int8": 8.5}[recipe.formats[loss.name]] * loss.elements for loss in LOSSES) / 210
    assert bits <= mean_bits


def test_a_size_that_cannot_be():
    with pytest.raises(ExportError, match=r"int4 alone takes 4\.5"):
        keep_sensitive(LOSSES, LOW, HIGH, 4.0)


def test_what_is_written_is_read(tmp_path):
    recipe = keep_sensitive(LOSSES, LOW, HIGH, 6.6)
    write_recipe(tmp_path / "recipe.toml", recipe, LOSSES)
    assert read_recipe(tmp_path / "recipe.toml", ["int4", "int8"]) == recipe
    assert "mean KL 0.4" in (tmp_path / "recipe.toml").read_text()


def test_the_first_line_that_fits_decides():
    recipe = Recipe({"*.3.*": "int8", "model.layers.*": "int4"})
    assert recipe.format_of("model.layers.3.mlp.down_proj.weight") == "int8"
    assert recipe.format_of("model.layers.13.mlp.down_proj.weight") == "int4"
    assert recipe.format_of("lm_head.weight") is None


def test_a_line_that_fits_nothing_is_refused():
    recipe = Recipe({"model.layers.0.*": "int8", "model.layer.1.*": "int8"})
    with pytest.raises(ExportError, match=r"recipe's model\.layer\.1\.\* fits no tensor"):
        recipe.require_used(["model.layers.0.mlp.down_proj.weight"])
    Recipe({"model.layers.0.*": "int8"}).require_used(["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot be read"),
        ("[tensors", "is no TOML"),
        ("", r"needs a table \[tensors\]"),
        ("[tensors]\n", r"needs a table \[tensors\]"),
        ('[tensors]\na = "int8"\n[other]\n', "holds other"),
        ('[tensors]\na = "int7"\n', r"format 'int7'; there are int4, int8"),
        ("[tensors]\na = 8\n", "format 8"),
        ('[tensors]\nmodel.layers = "int8"\n', "without quotes"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, reason):
    path = tmp_path / "recipe.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ExportError, match=reason):
        read_recipe(path, ["int4", "int8"])
