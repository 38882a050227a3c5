"""W8A8 with one fixed input scale per matrix, found on calibration text.

QuantizeLinear and TensorRT need a scale that does not depend on the input. This is harder than a scale per token: a
token with large values determines the step for all. So the smoothing is searched with the fixed scale. Then the range
of the 8 bits is searched, since clipping the largest values may cost less than a wider step.

Matrices that share an input share its smoothing. Where a recipe gives one of them another format, this search is
still the only one of the site: the scale fits the smoothed input, so no other search may smooth it again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from glm4_exporters.formats.base import INT8_MAX, SMALLEST_SCALE
from glm4_exporters.quantize.awq import QuantizeDequantize, quantized_rows, scales_by_activations
from glm4_exporters.quantize.calibrate import Site
from glm4_exporters.quantize.smooth import SmoothQuant, int8_per_row, int8_values, relative_error

# Ranges to try, as shares of the largest |x| on the calibration text.
SHARES = tuple(0.9**k for k in range(13))


@dataclass
class StaticSmoothQuant(SmoothQuant):
    """Searches scales for 8-bit weights per row and inputs with one fixed scale.

    Attributes:
        rounds_input: whether the matrix of this name rounds its input.
        quantize_dequantize: for matrices that do not round their input. None: their rows stay exact.
        input_scales: the step of the rounded input, by name of the matrix that reads it.
    """

    rounds_input: Callable[[str], bool] = lambda _name: True
    quantize_dequantize: QuantizeDequantize | None = None
    input_scales: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, site: Site) -> None:
        before = len(self.choices)
        super().__call__(site)
        if len(self.choices) == before:
            return  # not wanted
        columns = self.smoothing.columns.get(site.names[0])
        scales = torch.ones(site.sample.shape[1]) if columns is None else torch.from_numpy(columns)
        exact, weights = site.sample @ site.weight_sample.T, self._weights(site, scales)
        widest = _step(site, scales)
        errors = {
            share: relative_error(self._product(site, scales, weights, widest * share), exact)
            for share in SHARES
        }
        share = min(errors, key=lambda share: errors[share])
        step = max(widest * share, SMALLEST_SCALE)
        self.choices[-1] = replace(self.choices[-1], error=errors[share])
        self.input_scales |= dict.fromkeys(filter(self.rounds_input, site.names), step)

    def candidates(self, site: Site) -> Iterable[tuple[str, Tensor]]:
        yield from super().candidates(site)
        if not all(map(self.rounds_input, site.names)):
            yield from scales_by_activations(self.config, site)

    def product(self, site: Site, scales: Tensor) -> Tensor:
        return self._product(site, scales, self._weights(site, scales), _step(site, scales))

    def _weights(self, site: Site, scales: Tensor) -> list[Tensor]:
        """The sampled rows of each matrix, smoothed, in its own format."""

        def quantized(name: str, weight: Tensor, importance: Tensor) -> Tensor:
            if self.rounds_input(name):
                return int8_per_row(weight)
            own = self.quantize_dequantize
            return weight if own is None else own(name, weight, importance)

        return quantized_rows(quantized, site, scales)

    def _product(self, site: Site, scales: Tensor, weights: list[Tensor], step: float) -> Tensor:
        smooth = site.sample / scales
        inputs = int8_values(smooth, step)
        products = [
            (inputs if self.rounds_input(name) else smooth) @ rows.T
            for name, rows in zip(site.names, weights, strict=True)
        ]
        return torch.cat(products, 1)


def _step(site: Site, scales: Tensor) -> float:
    """The step with which 255 steps reach the largest |x| of all calibration tokens."""
    return max(float((torch.from_numpy(site.statistics.absmax) / scales).max()) / INT8_MAX, SMALLEST_SCALE)
