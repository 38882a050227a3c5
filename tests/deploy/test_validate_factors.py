"""Factors per channel: which the next matrix undoes, whatever the rounding of its weights."""

import itertools

import numpy as np
import pytest

from glm4_deploy.validate.factors import expected_factor, found_factors, is_undone, undone_columns
from glm4_exporters.quantize.smooth import LARGEST_SCALE

ROWS, CHANNELS, SLACK = 512, 64, 5e-3
LIMIT = {4: 0.4, 8: 0.06}  # largest errors of the bands


def rounded(weight, bits, block=32, fitted=False):
    """Symmetric rounding to integers in blocks of a row; ``fitted`` chooses the step of least error for the integers."""
    parts = weight.reshape(len(weight), -1, block)
    step = np.abs(parts).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    codes = np.round(parts / step)
    if fitted:
        step = (parts * codes).sum(-1, keepdims=True) / (codes**2).sum(-1, keepdims=True)
    return (codes * step).reshape(weight.shape)


def case(seed, bits, fitted=False, spread=0.3):
    """A matrix, centred factors, and what the rounded matrix undoes of them."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((ROWS, CHANNELS)) / 8
    factors = 2 ** rng.uniform(-spread, spread, CHANNELS)
    factors /= np.sqrt(factors.min() * factors.max())
    return weight, factors, undone(weight, rounded(weight / factors, bits, fitted=fitted), bits)


def undone(weight, stored, bits):
    return undone_columns(stored.T, weight.T, LIMIT[bits])


RIGHT = list(itertools.product((4, 8), (False, True), (0.02, 0.3, 3.0)))


@pytest.mark.parametrize(("bits", "fitted", "spread"), RIGHT)
def test_right_factors_are_undone(bits, fitted, spread):
    for seed in range(25):
        _, factors, reader = case(seed, bits, fitted, spread)
        assert is_undone(factors, reader, SLACK), seed
        assert expected_factor(factors, [reader], SLACK, False) is factors


RNG = np.random.default_rng(99)
ALL = np.ones(CHANNELS)
WRONG = {
    "other order": RNG.permutation(np.linspace(0.5, 2, CHANNELS)),
    "one channel by 1.5": np.where(np.arange(CHANNELS) == 7, 1.5, 1),
    "all by 1.1": 1.1 * ALL,
    "all by 4": 4 * ALL,
    "each by up to 1.2": 1.2 ** RNG.uniform(-1, 1, CHANNELS),
    "one is 0": np.where(np.arange(CHANNELS) == 3, 0, 1),
    "NaN": np.nan * ALL,
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_factors_are_replaced_by_what_the_matrix_undoes(wrong, bits):
    for seed in range(10):
        _, factors, reader = case(seed, bits)
        found = WRONG[wrong] * factors
        assert not is_undone(found, reader, SLACK), seed
        np.testing.assert_allclose(expected_factor(found, [reader], SLACK, False), factors, rtol=0.1)


@pytest.mark.parametrize(("bits", "least"), [(4, 0.03), (8, 0.01)])
@pytest.mark.parametrize("fitted", [False, True])
def test_an_error_that_all_channels_have_is_seen(bits, least, fitted):
    """The sizes that docs/validate.md names."""
    for seed, size in itertools.product(range(10), (1 + least, 1 - least)):
        _, factors, reader = case(seed, bits, fitted)
        assert not is_undone(factors * size, reader, SLACK), (seed, size)


def test_a_factor_of_nothing_is_an_error():
    """The matrix is the checkpoint's, so a factor in front of it is wrong, centred or not."""
    weight, _, _ = case(0, 4)
    reader = undone(weight, rounded(weight, 4), 4)
    for found in (np.full(CHANNELS, 4.0), 2.0 ** np.linspace(-1, 1, CHANNELS)):
        assert (expected_factor(found, [reader], SLACK, True) == 1).all()


@pytest.mark.parametrize("size", [1.5, 0.3, 4])
def test_centred_factors_stay_in_front_of_a_matrix_that_is_wrong_by_a_number(size):
    weight, factors, _ = case(1, 4)
    reader = undone(size * weight, rounded(weight / factors, 4), 4)
    assert expected_factor(factors, [reader], SLACK, False) is factors


def test_a_matrix_that_is_another_says_nothing():
    weight, factors, _ = case(2, 4)
    reader = undone(np.roll(weight, 1, axis=0), rounded(weight / factors, 4), 4)
    assert not reader.fits
    assert expected_factor(factors, [reader], SLACK, False) is factors


def test_one_right_reader_of_several_is_enough():
    weight, factors, right = case(3, 4)
    wrong = undone(weight, rounded(weight * 3, 4), 4)
    assert expected_factor(factors, [wrong, right], SLACK, False) is factors


def test_columns_and_channels_without_values_have_no_factor():
    weight, factors, _ = case(4, 8)
    weight[:, 5] = 0
    reader = undone(weight, rounded(weight / factors, 8), 8)
    assert np.isinf(reader.error[5])
    assert is_undone(np.where(np.arange(CHANNELS) == 5, LARGEST_SCALE, factors), reader, SLACK)
    each, shared = found_factors([np.zeros((3, 4))], [np.zeros((3, 4))])
    assert (each == 1).all()
    assert (shared == 1).all()
