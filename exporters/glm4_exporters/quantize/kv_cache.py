"""The scales of an int8 KV cache: one per head and channel, of K and of V apart, from what calibration saw.

    scales = cache_scales(calibration, smoothing)
    QuantizeCache(scales)(model)

A cached number is round(x / scale), saturated at -128 and 127. K is stored rotated, so the two channels of
a rotated pair share a scale, from the largest radius of the pair: a position beyond the calibration text
turns the pair, and does not make it longer.
"""

from dataclasses import dataclass

import numpy as np

from glm4_exporters.quantize.calibrate import Calibration, Vector
from glm4_exporters.quantize.smooth import Smoothing

LEVELS = 127
MARGIN = 1.25  # room above the largest value that calibration saw
FLOOR = 1e-2  # of the head's largest value: a channel at rest during calibration need not stay there


@dataclass(frozen=True)
class CacheScales:
    """Of one layer, float32 [Hkv, D]: what one step of a stored number stands for."""

    key: Vector
    value: Vector


def cache_scales(calibration: Calibration, smoothing: Smoothing) -> tuple[CacheScales, ...]:
    """The scales of every layer, for the model as it is once smoothed."""
    return tuple(
        CacheScales(key=_scales(layer.key_radius), value=_scales(smoothing.value_absmax(calibration, index)))
        for index, layer in enumerate(calibration.layers)
    )


def _scales(largest: Vector) -> Vector:
    """From the largest |x| per head and channel; a head that is 0 throughout has any scale."""
    floor = np.maximum(FLOOR * largest.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny * LEVELS)
    scales: Vector = (np.maximum(largest, floor) * np.float32(MARGIN / LEVELS)).astype(np.float32)
    return scales
