"""Validate --layers names the sub-block that is wrong, and no other."""

import numpy as np
import onnx
import pytest
import torch
from bundles import rehash
from checkpoints import tiny_config, write_checkpoint
from cpu_operators import needs_cpu_operators
from safetensors.torch import load_file, save_file

from glm4_deploy.pipeline import ExportOptions, export
from glm4_deploy.validate import ValidateOptions, validate

LAYERS = 3


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return write_checkpoint(folder / "checkpoint", tiny_config(num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, good):
    """A function that exports the good checkpoint once per form."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def make(target, precision):
        if (target, precision) not in made:
            options = ExportOptions(target, precision, parity=False)
            made[target, precision] = export(good, folder / f"{target}-{precision}", options).bundle
        return made[target, precision]

    return make


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """Every token of the vocabulary once, so that a wrong row of the table or the head is seen."""
    path = tmp_path_factory.mktemp("ids") / "all.ids"
    order = np.random.default_rng(0).permutation(320)
    path.write_text("\n".join(" ".join(map(str, row)) for row in order.reshape(5, 64)))
    return path


def named(bundle, reference, ids):
    options = ValidateOptions(text=ids, layers=True, gate=None, greedy=False)
    report = validate(bundle, reference, options)
    culprit = report.culprit
    found = None if culprit is None else (culprit.error.layer, culprit.error.block)
    return found, [(block.layer, block.block) for block in report.out_of_band], report


def changed(good, folder, edit):
    """A copy of a checkpoint after ``edit(tensors)``."""
    folder.mkdir()
    tensors = load_file(good / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((good / "config.json").read_bytes())
    return folder


FORMS = [("ort", "fp32"), ("native", "fp32"), ("ort", "fp16"), ("native", "fp16"), ("ort", "bf16"),
         ("ort", "int8"), ("native", "int8"), ("ort", "int4"),
         *(pytest.param("cpu", form, marks=needs_cpu_operators) for form in ("int8", "int4"))]  # fmt: skip


@pytest.mark.parametrize(("target", "precision"), FORMS)
def test_a_right_bundle_has_no_culprit(bundles, good, ids, target, precision):
    found, wrong, report = named(bundles(target, precision), good, ids)
    assert found is None
    assert wrong == []
    blocks = {(block.layer, block.block) for block in report.blocks}
    assert len(blocks) == len(report.blocks) == 12 * LAYERS + 3
    assert all(block.local is not None and not block.covers for block in report.blocks)


def negate(tensor):
    tensor.neg_()


def one_row(tensor):
    tensor[17] *= 3


def one_number(tensor):
    tensor.view(-1)[5] += 4


def swap_halves(tensor):
    tensor.copy_(torch.cat(tensor.chunk(2)[::-1]))


def noise(tensor):
    tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * tensor.std())


WRONG = [
    ("model.embed_tokens.weight", one_row, (None, "embedding")),
    ("model.layers.1.input_layernorm.weight", one_number, (1, "input_layernorm")),
    ("model.layers.0.self_attn.q_proj.weight", noise, (0, "qk")),
    ("model.layers.2.self_attn.k_proj.bias", negate, (2, "qk")),
    ("model.layers.1.self_attn.v_proj.weight", negate, (1, "v")),
    ("model.layers.1.self_attn.v_proj.bias", one_number, (1, "v")),
    ("model.layers.2.self_attn.o_proj.weight", noise, (2, "o_proj")),
    ("model.layers.0.post_self_attn_layernorm.weight", one_number, (0, "post_self_attn_layernorm")),
    ("model.layers.1.post_attention_layernorm.weight", one_number, (1, "post_attention_layernorm")),
    ("model.layers.1.mlp.gate_up_proj.weight", swap_halves, (1, "gate_up")),
    ("model.layers.2.mlp.gate_up_proj.weight", one_number, (2, "gate_up")),
    ("model.layers.0.mlp.down_proj.weight", one_row, (0, "down")),
    ("model.layers.2.post_mlp_layernorm.weight", one_number, (2, "post_mlp_layernorm")),
    ("model.norm.weight", one_number, (None, "final_norm")),
    ("lm_head.weight", one_row, (None, "head")),
]


@pytest.mark.parametrize(("target", "precision"), [("ort", "fp16"), ("native", "int8")])
@pytest.mark.parametrize(("name", "edit", "block"), WRONG)
def test_one_wrong_tensor_is_named(tmp_path, bundles, good, ids, target, precision, name, edit, block):
    """The two sides differ in one tensor; it does not matter on which of them it is the wrong one."""
    other = changed(good, tmp_path / "other", lambda tensors: edit(tensors[name]))
    found, wrong, report = named(bundles(target, precision), other, ids)
    assert found == block
    assert wrong == [block]
    assert "given the reference's input" in report.culprit.why


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_bundle_of_a_corrupted_checkpoint(tmp_path, good, ids, precision):
    bad = changed(good, tmp_path / "bad", lambda t: noise(t["model.layers.1.mlp.down_proj.weight"]))
    bundle = export(bad, tmp_path / "bundle", ExportOptions("ort", precision, parity=False)).bundle
    assert named(bundle, good, ids)[0] == (1, "down")


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_bundle_with_gate_and_up_swapped(tmp_path, good, ids, precision):
    bad = changed(good, tmp_path / "bad", lambda t: swap_halves(t["model.layers.2.mlp.gate_up_proj.weight"]))
    bundle = export(bad, tmp_path / "bundle", ExportOptions("native", precision, parity=False)).bundle
    found, wrong, _ = named(bundle, good, ids)
    assert found == (2, "gate_up")
    assert wrong == [(2, "gate_up")]


@pytest.mark.parametrize("layers", [{1}, set(range(LAYERS))])
@pytest.mark.parametrize(
    ("target", "operator", "attribute"),
    [("ort", "GroupQueryAttention", "rotary_interleaved"), ("native", "RotaryEmbedding", "interleaved")],
)
def test_rope_as_half_split(tmp_path, ids, target, operator, attribute, layers):
    config = tiny_config(num_hidden_layers=LAYERS, head_dim=32)  # as GroupQueryAttention rotates by itself
    good = write_checkpoint(tmp_path / "checkpoint", config)
    bundle = export(good, tmp_path / "bundle", ExportOptions(target, "int8", parity=False)).bundle
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    patched = 0
    for node in model.graph.node:
        if node.op_type == operator and any(f"layers.{i}." in node.name for i in layers):
            flag = next(one for one in node.attribute if one.name == attribute)
            assert flag.i == 1
            flag.i = 0
            patched += 1
    assert patched >= len(layers)
    onnx.save(model, bundle / "model.onnx")
    rehash(bundle)
    found, wrong, _ = named(bundle, good, ids)
    assert found == (min(layers), "attention")
    assert wrong == [(i, "attention") for i in sorted(layers)]


def test_errors_that_only_add_up_are_called_that(bundles, good, ids, monkeypatch):
    """No sub-block is wrong by itself; a drift limit that is too low must not blame one."""
    from glm4_deploy.validate import bands

    tight = bands.Band(local=6e-2, worst=0.3, drift=1e-3)
    monkeypatch.setitem(bands.BANDS, "int8", tight)
    _, wrong, report = named(bundles("ort", "int8"), good, ids)
    assert wrong == []
    assert "no sub-block is wrong by itself" in report.culprit.why
