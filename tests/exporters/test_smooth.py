"""Scales folded into the weights: the same function, and easier to quantize."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from safetensors.torch import save_file
from tokenizers import Tokenizer

from benchmarks.make_hostile_checkpoints import write_outliers
from glm4_exporters import streamed
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.quantize.awq import AwqSearch
from glm4_exporters.quantize.calibrate import calibrate
from glm4_exporters.quantize.smooth import (
    Smoothing,
    SmoothQuant,
    fold,
    foldable,
    int8_per_row,
    shared_by_readers,
)
from glm4_exporters.streamed import reference_outputs

DEMO = Path(__file__).parents[2] / "demo"
SEQUENCES = [list(range(5, 60)), list(range(300, 250, -1))]
SHAPES = {
    "bias, 2 kv heads": {},
    "no bias, 1 kv head": dict(attention_bias=False, num_key_value_heads=1),
    "as many kv heads": dict(num_key_value_heads=4),
    "tied": dict(tie_word_embeddings=True),
    "wide heads, fully rotated": dict(head_dim=24, partial_rotary_factor=1.0, attention_bias=False),
}


def smoothed(checkpoint, smoothing, folder, rows=7):
    """The checkpoint with its tensors scaled, each in blocks of a few rows."""
    folder.mkdir()
    tensors = {}
    for name in checkpoint.tensors:
        blocks = checkpoint.read(name).float().split(rows)
        tensors[name] = torch.cat([smoothing.apply(name, b, i * rows) for i, b in enumerate(blocks)])
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(checkpoint.folder / "config.json", folder)
    return Checkpoint.load(folder)


def random_scales(config, names, channels):
    scales = torch.exp(torch.randn(channels, generator=torch.Generator().manual_seed(channels)))
    return shared_by_readers(config, names, scales)


@pytest.mark.parametrize("shape", SHAPES)
def test_folding_any_scales_leaves_the_function(tmp_path, shape):
    checkpoint = Checkpoint.load(write_checkpoint(tmp_path / "plain", tiny_config(**SHAPES[shape])))
    config, smoothing, sites = checkpoint.config, Smoothing(), []
    calibration = calibrate(checkpoint, SEQUENCES, sites.append)
    for site in sites:
        if foldable(config, site.names):
            scales = random_scales(config, site.names, site.sample.shape[1])
            smoothing = smoothing.then(fold(config, site.names, scales))
    assert ("lm_head.weight" in smoothing.names) != config.tie_word_embeddings
    scaled = smoothed(checkpoint, smoothing, tmp_path / "scaled")
    expected = np.concatenate(reference_outputs(checkpoint, SEQUENCES))
    found = np.concatenate(reference_outputs(scaled, SEQUENCES))
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())

    # What is said of the smoothed model without walking it again is what a walk over it shows.
    after = calibrate(scaled, SEQUENCES)
    for name in (name for site in sites for name in site.names):
        found = after.input_of(name)
        np.testing.assert_allclose(
            smoothing.input_absmax(calibration, name), found.absmax, rtol=1e-3, atol=1e-6
        )
    for i, layer in enumerate(after.layers):
        np.testing.assert_allclose(smoothing.value_absmax(calibration, i), layer.value_absmax, rtol=1e-3)


def test_a_tensor_without_scales_is_not_touched():
    block = torch.ones(2, 3, dtype=torch.bfloat16)
    assert Smoothing().apply("any", block, 0) is block


# ------------------------------------------------------------------ the demo, and the demo made hostile


@pytest.fixture(scope="module")
def text():
    """Two documents' beginnings of the demo's held-out text."""
    tokenizer = Tokenizer.from_file(str(DEMO / "glm4-tiny" / "tokenizer.json"))
    documents = (DEMO / "heldout.txt").read_text("utf-8").split("\n\f\n")
    return [tokenizer.encode(document, add_special_tokens=False).ids[:400] for document in documents[:3]]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return Checkpoint.load(
        write_outliers(DEMO / "glm4-tiny", tmp_path_factory.mktemp("hostile") / "outliers")
    )


@torch.inference_mode()
def w8a8_outputs(checkpoint, sequences, smoothing):
    """The reference with every matrix of its layers in 8 bits per row, and what they read per token."""

    def round_input(module, arguments):
        return (int8_per_row(arguments[0][0])[None],)

    hidden = streamed.embed_sequences(checkpoint, sequences)
    attends = [streamed.full_attention(checkpoint.config, len(ids)) for ids in sequences]
    for index, layer in enumerate(streamed.layers(checkpoint)):
        for name, parameter in layer.named_parameters():
            scaled = smoothing.apply(f"model.layers.{index}.{name}", parameter.data, 0)
            parameter.data = int8_per_row(scaled) if scaled.dim() == 2 else scaled
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(round_input)
        hidden = [layer(x, attend) for x, attend in zip(hidden, attends, strict=True)]
    return streamed.finish(checkpoint, hidden)


def mean_kl(expected, found):
    p, q = (torch.from_numpy(np.concatenate(x)).log_softmax(-1) for x in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_planted_outliers_leave_the_function_to_the_bit(hostile, text):
    plain = reference_outputs(Checkpoint.load(DEMO / "glm4-tiny"), text)
    for one, other in zip(plain, reference_outputs(hostile, text), strict=True):
        np.testing.assert_array_equal(one, other)


def test_smoothing_takes_planted_outliers_away(hostile, text):
    search = SmoothQuant(hostile.config, wanted=lambda names: "lm_head.weight" not in names)
    calibrate(hostile, text[:2], search)
    expected = reference_outputs(hostile, text)
    plain, smooth = (
        mean_kl(expected, w8a8_outputs(hostile, text, smoothing))
        for smoothing in (Smoothing(), search.smoothing)
    )
    assert plain > 0.04  # the demo without outliers: 0.0003
    assert smooth < 0.0006
    for choice in search.choices:
        assert choice.error <= choice.error_before
        if choice.names[0].endswith(("q_proj.weight", "gate_up_proj.weight")):
            assert choice.error < choice.error_before / 100


def int4_blocks(_name, weight, _importance):
    blocks = weight.unflatten(1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 7
    return ((blocks / step).round().clamp(-8, 7) * step).flatten(1)


@torch.inference_mode()
def int4_outputs(checkpoint, sequences, smoothing):
    hidden = streamed.embed_sequences(checkpoint, sequences)
    attends = [streamed.full_attention(checkpoint.config, len(ids)) for ids in sequences]
    for index, layer in enumerate(streamed.layers(checkpoint)):
        for name, parameter in layer.named_parameters():
            scaled = smoothing.apply(f"model.layers.{index}.{name}", parameter.data, 0)
            parameter.data = int4_blocks("", scaled, None) if scaled.dim() == 2 else scaled
        hidden = [layer(x, attend) for x, attend in zip(hidden, attends, strict=True)]
    return streamed.finish(checkpoint, hidden)


def test_awq_rounds_what_carries_much_more_finely(hostile, text):
    search = AwqSearch(
        hostile.config, wanted=lambda names: "lm_head.weight" not in names, quantize_dequantize=int4_blocks
    )
    calibrate(hostile, text[:2], search)
    expected = reference_outputs(hostile, text)
    plain, aware = (
        mean_kl(expected, int4_outputs(hostile, text, smoothing))
        for smoothing in (Smoothing(), search.smoothing)
    )
    assert aware < 0.6 * plain


def test_each_matrix_is_searched_in_its_own_format(tiny_checkpoint):
    """Of q, k and v only v loses anything, so the scales that are found are those of v's format alone."""
    checkpoint, told = Checkpoint.load(tiny_checkpoint), {}

    def quantizer(name, weight, _importance):
        told[name] = weight
        return int4_blocks(name, weight, None) if name.endswith("v_proj.weight") else weight

    def of_first_layer(names):
        return names[0].startswith("model.layers.0.self_attn.q_proj")

    search = AwqSearch(checkpoint.config, wanted=of_first_layer, quantize_dequantize=quantizer)
    sites = []
    calibrate(checkpoint, SEQUENCES, sites.append, search)
    names = [f"model.layers.0.self_attn.{matrix}_proj.weight" for matrix in "qkv"]
    assert list(told) == names
    assert sites[0].sampled == tuple(len(told[name]) for name in names) == (64, 32, 32)
    (choice,) = search.choices
    _, _, value = sites[0].weight_sample.split(sites[0].sampled)
    wanted, lost = (
        sites[0].sample @ sites[0].weight_sample.T,
        sites[0].sample @ (int4_blocks("", value, None) - value).T,
    )
    error = (lost.square().sum(1) / wanted.square().sum(1)).mean()
    assert choice.error_before == pytest.approx(float(error), rel=1e-4)


def test_the_quantizer_is_told_what_matters(tiny_checkpoint):
    """Importance is the mean x^2 of the input as it is once scaled."""
    checkpoint, told = Checkpoint.load(tiny_checkpoint), []

    def quantizer(_name, weight, importance):
        told.append((weight, importance))
        return weight

    search = AwqSearch(checkpoint.config, quantize_dequantize=quantizer)
    sites = []
    calibrate(checkpoint, SEQUENCES, sites.append, search)
    weight, importance = told[-1]
    scales = weight[0] / sites[-1].weight_sample[0]
    np.testing.assert_allclose(importance * scales**2, sites[-1].statistics.mean_square, rtol=1e-4)
