"""W8A8 with one input scale per matrix, found on calibration text and fixed from then on.

A scale that need not look at the input is what QuantizeLinear takes and TensorRT parses. It is the harder
form: a token with large values sets the step of all others. So the smoothing is searched for under it, and
then how far the 8 bits should reach, since clipping the largest values may cost less than a wider step.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from glm4_exporters.quantize.calibrate import Site
from glm4_exporters.quantize.smooth import SmoothQuant, int8_per_row, relative_error

LARGEST = 127
# Of the largest |x| on the calibration text, at which the largest integer may stand.
SHARES = tuple(0.9**k for k in range(13))
SMALLEST = 2.0**-14  # a scale, float16's smallest number of full precision: an input of zeros has one too


@dataclass
class StaticSmoothQuant(SmoothQuant):
    """Scales for 8-bit weights per row and inputs under one scale.

    Attributes:
        input_scales: by name of each matrix of a wanted site, the step of what it reads.
    """

    input_scales: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, site: Site) -> None:
        before = len(self.choices)
        super().__call__(site)
        if len(self.choices) == before:
            return  # not wanted
        columns = self.smoothing.columns.get(site.names[0])
        scales = torch.ones(site.sample.shape[1]) if columns is None else torch.from_numpy(columns)
        exact, weights = site.sample @ site.weight_sample.T, int8_per_row(site.weight_sample * scales).T
        smooth, widest = site.sample / scales, _step(site, scales)
        errors = {
            share: relative_error(int8_values(smooth, widest * share) @ weights, exact) for share in SHARES
        }
        share = min(errors, key=lambda share: errors[share])
        step = max(widest * share, SMALLEST)
        self.choices[-1] = replace(self.choices[-1], error=errors[share])
        self.input_scales |= dict.fromkeys(site.names, step)

    def product(self, site: Site, scales: Tensor) -> Tensor:
        inputs = int8_values(site.sample / scales, _step(site, scales))
        return inputs @ int8_per_row(site.weight_sample * scales).T


def int8_values(x: Tensor, step: float) -> Tensor:
    """The values that x has after rounding to 255 multiples of ``step``."""
    return (x / step).round().clamp(-LARGEST, LARGEST) * step


def _step(site: Site, scales: Tensor) -> float:
    """Of 255 steps that reach the largest |x| of all calibration tokens."""
    return max(float((torch.from_numpy(site.statistics.absmax) / scales).max()) / LARGEST, SMALLEST)
