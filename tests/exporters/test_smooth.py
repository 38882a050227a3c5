"""Scales folded into the weights: the same function, and easier to quantize."""

import shutil

import numpy as np
import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from safetensors.torch import save_file

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.quantize.calibrate import calibrate
from glm4_exporters.quantize.smooth import Smoothing, fold, foldable, shared_by_readers
from glm4_exporters.streamed import reference_outputs

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
        np.testing.assert_allclose(
            smoothing.importance(calibration, name), found.mean_square, rtol=1e-3, atol=1e-6
        )
    for i, layer in enumerate(after.layers):
        np.testing.assert_allclose(smoothing.value_absmax(calibration, i), layer.value_absmax, rtol=1e-3)


def test_a_tensor_without_scales_is_not_touched():
    block = torch.ones(2, 3, dtype=torch.bfloat16)
    assert Smoothing().apply("any", block, 0) is block
