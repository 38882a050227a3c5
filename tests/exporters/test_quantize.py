"""Integers and scales: how close they lie to the weights, and how they are packed."""

import numpy as np
import pytest
import torch

from glm4_exporters.quantize import blocks
from glm4_exporters.quantize.schemes import SCHEMES, Scheme, require_scheme
from glm4_runtime.errors import ExportError


def weights(rows=48, width=320, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.03


def error(w, scheme, importance=None, dtype=torch.bfloat16):
    numbers, scales = blocks.quantize(w, scheme, dtype, importance)
    difference = (blocks.dequantize(numbers, scales, scheme, w.shape[1]) - w) ** 2
    return float((difference if importance is None else difference * importance).sum())


def by_absmax(w, scheme):
    """Squared error of the plain method: the largest number stands at the block's largest |w|."""
    size = scheme.block or w.shape[1]
    w = torch.nn.functional.pad(w, (0, -w.shape[1] % size)).reshape(len(w), -1, size)
    step = w.abs().amax(-1, keepdim=True).clamp(min=1e-30) / scheme.largest
    return float(((w / step).round() * step - w).square().sum())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("width", [320, 128, 96, 33, 1])
def test_each_number_is_within_its_step(name, width):
    scheme, w = SCHEMES[name], weights(width=width)
    numbers, scales = blocks.quantize(w, scheme, torch.bfloat16)
    assert numbers.shape == (48, scheme.stored_width(width))
    assert scales.shape == (48, scheme.blocks(width))
    assert bool((scales != 0).all() if scheme.signed_scales else (scales > 0).all())
    assert scheme.smallest <= int(numbers.min()) <= int(numbers.max()) <= scheme.largest
    assert bool((numbers[:, width:] == 0).all())
    found = blocks.dequantize(numbers, scales, scheme, width)
    step = scales.float().abs().repeat_interleave(scheme.block or width, dim=1)[:, :width]
    inside = numbers[:, :width].abs() < scheme.largest
    assert bool(((found - w).abs() <= 0.5001 * step)[inside].all())


@pytest.mark.parametrize("name", SCHEMES)
def test_scales_beat_those_of_the_largest_weight(name):
    scheme = SCHEMES[name]
    gain = 1.0 if scheme.bits == 8 else 0.95
    assert error(weights(), scheme, dtype=torch.float32) < gain * by_absmax(weights(), scheme)


def test_an_outlier_is_clipped_where_that_costs_less():
    w = weights(rows=16, width=32)
    w[:, 5] = 0.2
    assert error(w, SCHEMES["int4"]) < 0.97 * by_absmax(w, SCHEMES["int4"])


def test_channels_that_count_are_rounded_better():
    w, importance = weights(), torch.ones(320)
    importance[::16] = 1000.0
    scheme = Scheme(4, 32, (1.0, 0.85))
    assert error(w, scheme, importance) < sum(
        float(
            (
                (blocks.dequantize(*blocks.quantize(w, scheme, torch.bfloat16), scheme, 320) - w) ** 2
                * importance
            )[i].sum()
        )
        for i in range(48)
    )


def test_zeros_and_tiny_weights_keep_a_positive_scale():
    w = torch.zeros(2, 64)
    w[1] = 1e-20
    for dtype in (torch.bfloat16, torch.float16):
        numbers, scales = blocks.quantize(w, SCHEMES["int4"], dtype)
        assert bool((scales > 0).all())
        assert bool((numbers[0] == 0).all())
        assert bool(torch.isfinite(scales).all())


def test_signed_scales_use_all_sixteen_numbers():
    w = weights()
    signed, scheme = SCHEMES["int4-signed"], SCHEMES["int4"]
    numbers, scales = blocks.quantize(w, signed, torch.bfloat16)
    assert int(numbers.min()) == -8
    assert bool((scales < 0).any())
    assert error(w, signed) < 0.92 * error(w, scheme)


def test_bytes_hold_two_numbers_the_first_in_the_low_half():
    scheme = SCHEMES["int4"]
    numbers = torch.tensor([[-7, 3, 0, 7]], dtype=torch.int8)
    assert blocks.pack_unsigned(numbers, scheme).tolist() == [[1 | 11 << 4, 8 | 15 << 4]]
    assert blocks.pack_signed(numbers, scheme).tolist() == [[9 | 3 << 4, 0 | 7 << 4]]
    wide = torch.tensor([[-127, 0, 127]], dtype=torch.int8)
    assert blocks.pack_unsigned(wide, SCHEMES["int8"]).tolist() == [[1, 128, 255]]
    assert blocks.pack_signed(wide, SCHEMES["int8"]).numpy().view(np.int8).tolist() == [[-127, 0, 127]]


def test_an_unknown_scheme_is_answered_with_the_known_ones():
    with pytest.raises(
        ExportError,
        match="unknown scheme 'int3'; the schemes are int8, int8-channel, int8-sq, int4, int4-fine, int4-wide, int4-signed",
    ):
        require_scheme("int3")
