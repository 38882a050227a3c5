"""Quantized bundles: they compute the stored integers exactly, whatever the checkpoint's shape."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from cpu_operators import CPU_TARGET

from benchmarks.make_hostile_checkpoints import write_overflow
from glm4_deploy.pipeline import ExportOptions, cache_key, export
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.form import choose_form
from glm4_exporters.quantize.recipe import Recipe
from glm4_exporters.task_models import load_model
from glm4_plugins.block_product import OPERATOR, unpack_codes
from glm4_runtime import Session
from glm4_runtime.bundle import read_manifest
from glm4_runtime.errors import ExportError

DEMO = Path(__file__).parents[2] / "demo" / "glm4-tiny"
SHAPES = {
    "biased": {},
    "unbiased, 8 KV heads": {"attention_bias": False, "num_attention_heads": 8, "num_key_value_heads": 8},
    "no multiple of a block": {"hidden_size": 72, "intermediate_size": 100},
    "tied": {"tie_word_embeddings": True},
    "tied, whole blocks": {"tie_word_embeddings": True, "hidden_size": 128},
    "narrow heads": {"head_dim": 8},
}
IDS = [5, 17, 300, 42, 42, 9, 250, 1]


def stored_matrices(bundle):
    """Every quantized matrix of a bundle in float32, decoded by NumPy from the file: independent of the exporter."""
    model = onnx.load(bundle / "model.onnx")
    arrays = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in model.graph.initializer
        if t.name.startswith(("model.", "lm_head."))
    }
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized", "DequantizeLinear", OPERATOR):
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == OPERATOR:
            numbers = unpack_codes(arrays[node.input[1]], attributes["bits"]).astype(np.float32)
            scales = arrays[node.input[2]].astype(np.float32).transpose(0, 2, 1)
            wide = np.repeat(scales.reshape(len(numbers), -1), attributes["block_size"], axis=1)
            matrix = (numbers * wide)[: attributes["columns"], : attributes["width"]]
            found[node.input[1].split(".codes")[0]] = matrix
            continue
        at = {"MatMulNBits": (1, 2), "GatherBlockQuantized": (0, 2), "DequantizeLinear": (0, 1)}[node.op_type]
        codes_name = node.input[at[0]]
        scales_name = next(
            (n.input[0] for n in model.graph.node if node.input[at[1]] in n.output), node.input[at[1]]
        )
        codes, scales = arrays[codes_name], arrays[scales_name].astype(np.float32)
        if node.op_type == "DequantizeLinear":
            numbers = codes.astype(np.float32)
            width = numbers.shape[1]
        else:
            flat = codes.reshape(len(codes), -1)
            if attributes["bits"] == 4:
                flat = np.stack((flat & 15, flat >> 4), -1).reshape(len(codes), -1)
            numbers = flat.astype(np.float32) - (1 << attributes["bits"] - 1)
            width = attributes.get("K", numbers.shape[1])
        block = attributes.get("block_size") or width
        wide = np.repeat(scales.reshape(len(scales), -1), block, axis=1)[:, : numbers.shape[1]]
        found[codes_name.split(".codes")[0]] = (numbers * wide)[:, :width]
    return found


def expected_matrix(checkpoint, name, form):
    """A matrix as its format rounds it, straight from the checkpoint."""
    weight = checkpoint.read(checkpoint.name_of(name)).float()
    return form.decode(form.encode(weight, torch.bfloat16), weight.shape[1]).numpy()


def with_stored_weights(checkpoint, stored):
    """The reference model with the bundle's matrices in place of its own."""
    model = load_model(checkpoint)
    parameters = dict(model.named_parameters())
    for name, matrix in stored.items():
        assert np.abs(matrix).max() > 0
        with torch.no_grad():
            parameters[name].copy_(torch.from_numpy(matrix))
    return model


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("target", ["ort", CPU_TARGET, "native"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bundle_computes_its_stored_integers(tmp_path, shape, target, precision):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(**SHAPES[shape]))
    options = ExportOptions(target=target, precision=precision, parity=False, max_batch_size=2)
    bundle = export(folder, tmp_path / "bundle", options).bundle
    with Checkpoint.load(folder) as checkpoint, Session.open(bundle, verify=True) as session:
        form = choose_form(checkpoint.config, "causal-lm", target, precision)
        stored = stored_matrices(bundle)
        assert stored.keys() == form.formats.keys()
        for name, matrix in stored.items():
            np.testing.assert_array_equal(matrix, expected_matrix(checkpoint, name, form.formats[name]))
        model = with_stored_weights(checkpoint, stored)
        # ONNX Runtime rounds activations to 8 bits per block inside its kernels, in both dialects.
        with torch.inference_mode():
            expected = model(torch.tensor([IDS])).logits[0].numpy()
        found = np.concatenate(list(session.score(IDS)))
        relative = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
        assert relative < 0.03
        own = load_model(checkpoint)
        with torch.inference_mode():
            truth = own(torch.tensor([IDS])).logits[0].numpy()
        relative = np.sqrt(((found - truth) ** 2).mean() / (truth**2).mean())
        assert relative < {"int8": 0.04, "int4": 0.4}[precision]


@pytest.mark.parametrize("activations", ["fp32", "fp16", "bf16"])
def test_activations_are_chosen_apart_from_weights(tmp_path, activations):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(), dtype="bfloat16")
    for target in ("ort", "native"):
        options = ExportOptions(target=target, precision="int8", activations=activations)
        result = export(folder, tmp_path / target, options)
        assert result.parity is not None
        manifest = read_manifest(tmp_path / target)
        assert manifest.activations == {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[activations]
        assert manifest.kv_cache == manifest.activations
        assert manifest.tensor_precisions["layers"] == {"ort": "int8", "native": "int8-channel"}[target]


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "encoder"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("target", ["ort", CPU_TARGET, "native"])
def test_the_other_tasks_are_quantized_too(tmp_path, task, precision, target):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(), task=task)
    result = export(folder, tmp_path / "bundle", ExportOptions(target=target, precision=precision))
    assert result.parity is not None
    assert 1e-4 < result.parity.relative_error < 0.4


def test_a_recipe_for_a_head_that_is_the_embedding_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(tie_word_embeddings=True))
    recipe = Recipe({"lm_head.weight": "int4"})
    with (
        Checkpoint.load(folder) as checkpoint,
        pytest.raises(ExportError, match=r"lm_head\.weight.* fits no tensor"),
    ):
        choose_form(checkpoint.config, "causal-lm", "ort", "int8", recipe=recipe)


def test_a_tied_matrix_is_stored_once(tmp_path):
    sizes = {}
    for tied in (False, True):
        config = tiny_config(hidden_size=128, tie_word_embeddings=tied, vocab_size=4096)
        folder = write_checkpoint(tmp_path / f"{tied}", config)
        options = ExportOptions(precision="int8", parity=False)
        bundle = export(folder, tmp_path / f"bundle {tied}", options).bundle
        sizes[tied] = (bundle / "model.onnx.data").stat().st_size
    assert sizes[False] - sizes[True] >= 4096 * 128


def test_stored_bytes_are_what_the_format_says(tmp_path, tiny_checkpoint):
    found = {}
    for precision in ("fp32", "int8", "int4"):
        options = ExportOptions(precision=precision, parity=False)
        bundle = export(tiny_checkpoint, tmp_path / precision, options).bundle
        model = onnx.load(bundle / "model.onnx", load_external_data=False)
        layers = [t for t in model.graph.initializer if ".mlp.down_proj." in t.name]
        found[precision] = sum(
            int(next(e.value for e in t.external_data if e.key == "length")) for t in layers
        )
    numbers = 2 * 64 * 96
    assert found["fp32"] == 4 * numbers
    assert found["int8"] == 2 * (64 * 128 + 64 * 2)  # a block of 128 for 96 inputs, a scale of two bytes
    assert found["int4"] == numbers // 2 + 2 * (64 * 3 * 2)


def test_an_odd_width_in_four_bits_is_refused_before_the_work(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(intermediate_size=97))
    options = ExportOptions(target="native", precision="int4")
    with pytest.raises(ExportError, match=r"97 inputs per row.*--precision int8, or --target ort"):
        export(folder, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()
    export(folder, tmp_path / "bundle", ExportOptions(target="ort", precision="int4", parity=False))


def test_activations_of_a_plain_precision_are_its_own(tmp_path, tiny_checkpoint):
    options = ExportOptions(precision="fp16", activations="fp32")
    with pytest.raises(ExportError, match="activations of precision fp16 are fp16, not fp32"):
        export(tiny_checkpoint, tmp_path / "bundle", options)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_two_quantized_exports_are_byte_identical(tmp_path, tiny_checkpoint, precision):
    for name in ("one", "two"):
        export(tiny_checkpoint, tmp_path / name, ExportOptions(precision=precision, parity=False))
    for file in ("manifest.json", "model.onnx", "model.onnx.data"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# Calibration and recipes --------------------------------------------------------------------------


@pytest.fixture
def ids_file(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "text.ids"
    path.write_text("\n".join(" ".join(map(str, rng.integers(0, 320, 48))) for _ in range(8)))
    return path


def test_calibration_text_changes_what_int4_stores(tmp_path, tiny_checkpoint, ids_file):
    plain = ExportOptions(precision="int4", parity=False)
    told = dataclasses.replace(plain, calibration=str(ids_file))
    export(tiny_checkpoint, tmp_path / "plain", plain)
    result = export(tiny_checkpoint, tmp_path / "told", told)
    assert (tmp_path / "plain" / "model.onnx.data").read_bytes() != (
        tmp_path / "told" / "model.onnx.data"
    ).read_bytes()
    report = json.loads((tmp_path / "told" / "report.json").read_text())["calibration"]
    assert report["tokens"] == 8 * 48
    assert report["text"] == "text.ids"
    assert [row["layer"] for row in report["largest_activations"]] == [0, 1]
    assert any(choice["error"] < choice["error_before"] for choice in report["scales"])
    assert report["rounded_on_tokens"] == report["tokens"]  # all of so short a text
    assert result.calibration == report


@pytest.mark.parametrize(
    ("precision", "more", "used"),
    [
        ("fp32", {}, False),
        ("bf16", {}, False),
        ("int8", {}, False),
        ("int8", {"activations": "bf16"}, False),
        ("fp16", {}, True),
        ("int8", {"activations": "fp16"}, True),
        ("int8", {"kv_cache": "int8"}, True),
        ("int4", {}, True),
        ("int8-sq", {}, True),
    ],
)
def test_text_that_changes_nothing_is_refused(tiny_checkpoint, ids_file, precision, more, used):
    options = ExportOptions(precision=precision, calibration=str(ids_file), **more)
    if used:
        assert len(cache_key(tiny_checkpoint, options)) == 64
        return
    with pytest.raises(ExportError, match="--calibration changes nothing"):
        cache_key(tiny_checkpoint, options)


def test_the_cache_key_holds_the_texts_content(tmp_path, tiny_checkpoint, ids_file):
    options = ExportOptions(precision="int4", calibration=str(ids_file))
    before = cache_key(tiny_checkpoint, options)
    moved = tmp_path / "moved.ids"
    moved.write_bytes(ids_file.read_bytes())
    assert cache_key(tiny_checkpoint, dataclasses.replace(options, calibration=str(moved))) == before
    ids_file.write_text("1 2 3 4")
    assert cache_key(tiny_checkpoint, options) != before


def test_a_recipe_gives_single_matrices_another_format(tmp_path, tiny_checkpoint):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[tensors]\n"model.layers.1.self_attn.*" = "int8"\n')
    options = ExportOptions(precision="int4", recipe=str(recipe), parity=False)
    bundle = export(tiny_checkpoint, tmp_path / "bundle", options).bundle
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    bits = {
        node.input[1].split(".weight")[0]: next(a.i for a in node.attribute if a.name == "bits")
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }
    assert {name for name, b in bits.items() if b == 8} == {
        "lm_head",
        *(f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"),
    }


def test_a_recipe_that_fits_nothing_is_refused(tmp_path, tiny_checkpoint):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[tensors]\n"model.layers.7.mlp.down_proj.weight" = "int8"\n')
    with pytest.raises(ExportError, match="fits no tensor"):
        export(tiny_checkpoint, tmp_path / "b", ExportOptions(precision="int4", recipe=str(recipe)))
    with pytest.raises(ExportError, match="quantizes nothing"):
        export(tiny_checkpoint, tmp_path / "b", ExportOptions(precision="fp16", recipe=str(recipe)))


# fp16's range -------------------------------------------------------------------------------------


def test_a_model_that_overflows_fp16_is_scaled_back_and_right(tmp_path):
    folder = write_overflow(DEMO, tmp_path / "overflow", layer=0)
    result = export(folder, tmp_path / "bundle", ExportOptions(precision="fp16"))
    manifest = read_manifest(tmp_path / "bundle")
    assert list(manifest.scaled_bits) == ["model.layers.0.post_mlp_layernorm"]
    worst = max(result.calibration["largest_activations"], key=lambda row: row["of_limit"])
    assert worst["layer"] == 0
    assert worst["worst"] == "down_proj"
    assert worst["of_limit"] > 1
    assert result.parity is not None
    assert result.parity.mean_kl is not None
    assert result.parity.mean_kl < 1e-5


@pytest.mark.parametrize("name", ["int8-channel", "int4-signed", "fp8"])
def test_a_recipe_cannot_name_a_targets_own_format(tmp_path, tiny_checkpoint, name):
    """They hold for some targets only: TensorRT wants positive scales, and lookups want blocks."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[tensors]\n"model.embed_tokens.weight" = "{name}"\n')
    with pytest.raises(ExportError, match=f"the format '{name}'; there are int8, int8-sq, int4"):
        export(tiny_checkpoint, tmp_path / "b", ExportOptions(precision="int4", recipe=str(recipe)))


def test_a_recipe_decides_how_the_table_is_looked_up(tmp_path):
    """Rows of 64 are no whole blocks of int8's 128, but of int4's 32: the default keeps them, a recipe need not."""
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(hidden_size=64))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[tensors]\n"model.embed_tokens.weight" = "int4"\n')
    for name, asked, stored in (("plain", None, "float32"), ("told", str(recipe), "int4-signed")):
        options = ExportOptions(precision="int8", recipe=asked, parity=False)
        export(folder, tmp_path / name, options)
        assert read_manifest(tmp_path / name).tensor_precisions["embedding"] == stored
