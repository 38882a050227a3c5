"""One input scale per matrix: found where the product loses least."""

import numpy as np
import pytest
import torch
from checkpoints import tiny_config

from glm4_exporters.config import Glm4Config
from glm4_exporters.formats.base import SMALLEST_SCALE
from glm4_exporters.quantize.calibrate import InputStatistics, Site
from glm4_exporters.quantize.static import StaticSmoothQuant

NAMES = tuple(f"model.layers.0.self_attn.{matrix}_proj.weight" for matrix in "qkv")


def site_of(sample, absmax=None):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(96, sample.shape[1], generator=generator)
    absmax = sample.abs().amax(0).numpy() if absmax is None else absmax
    statistics = InputStatistics(absmax, *(np.zeros(1, np.float32),) * 2)
    return Site(NAMES, statistics, sample, weights, weights.abs().amax(0), (32, 32, 32))


def search_over(site):
    search = StaticSmoothQuant(Glm4Config.from_dict(tiny_config()))
    search(site)
    return search


def test_matrices_of_one_input_share_its_scale_and_the_error_is_what_it_says():
    sample = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    sample[:, 5] *= 50
    site = site_of(sample)
    search = search_over(site)
    (choice,) = search.choices
    assert search.input_scales.keys() == set(NAMES)
    (step,) = set(search.input_scales.values())

    smoothing = search.smoothing.columns[NAMES[0]]
    x, w = sample.numpy() / smoothing, site.weight_sample.numpy() * smoothing
    x = np.clip(np.round(x / step), -127, 127) * step
    rows = np.abs(w).max(1, keepdims=True) / 127
    found, exact = x @ (np.round(w / rows) * rows).T, sample.numpy() @ site.weight_sample.numpy().T
    error = (((found - exact) ** 2).sum(1) / (exact**2).sum(1)).mean()
    assert choice.error == pytest.approx(error, rel=1e-3)
    assert choice.error < choice.error_before / 20


def test_a_rare_large_value_is_clipped_rather_than_widening_every_step():
    sample = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    plain = search_over(site_of(sample)).input_scales[NAMES[0]]
    seen_elsewhere = sample.abs().amax(0).numpy() * 3  # by a token that is not in the sample
    search = search_over(site_of(sample, seen_elsewhere))
    assert search.input_scales[NAMES[0]] < 1.3 * plain


def test_an_input_at_rest_has_a_scale():
    assert search_over(site_of(torch.zeros(4, 64))).input_scales[NAMES[0]] == SMALLEST_SCALE
