"""The scales of a quantized KV cache, from the calibration: one per head and channel, for K and V separately.

    scales = cache_scales(calibration, smoothing, "int8")
    QuantizeCache(scales)(model)

A cached number is round(x / scale), saturated at the limits of its type. K is stored after rotation, so the two channels of a
rotated pair share a scale. The scale comes from the largest radius of the pair, which a rotation does not change.
"""

from dataclasses import dataclass

import numpy as np

from glm4_exporters.formats.base import INT8_MAX
from glm4_exporters.quantize.calibrate import Calibration, Magnitudes
from glm4_exporters.quantize.smooth import Smoothing

LARGEST = {"int8": float(INT8_MAX), "float8e4m3fn": 448.0}  # of a type's numbers
MARGIN = 1.25  # headroom above the largest value in the calibration
SMALLEST_SHARE = 1e-2  # lower bound, as a share of the head's largest value: a channel near 0 in the calibration may be larger later


@dataclass(frozen=True)
class CacheScales:
    """Scales of one layer, float32 [Hkv, D]: value = code * scale."""

    key: Magnitudes
    value: Magnitudes


def cache_scales(
    calibration: Calibration, smoothing: Smoothing, element: str = "int8"
) -> tuple[CacheScales, ...]:
    """The scales of every layer of the smoothed model. ``element``: the cache's element type."""
    limit = LARGEST[element]
    return tuple(
        CacheScales(
            _scales(layer.key_radius, limit), _scales(smoothing.value_absmax(calibration, index), limit)
        )
        for index, layer in enumerate(calibration.layers)
    )


def _scales(largest: Magnitudes, limit: float) -> Magnitudes:
    """Scales from the largest |x| per head and channel, for numbers up to ``limit``."""
    floor = np.maximum(
        SMALLEST_SHARE * largest.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny * limit
    )
    scales: Magnitudes = (np.maximum(largest, floor) * np.float32(MARGIN / limit)).astype(np.float32)
    return scales
