"""Smoothing scales for low-bit weights: channels with large activations are rounded more finely.

The method of "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (Lin et al.,
2023): s is a power of the mean |x| of a channel. The exponent of a site is the one with the least error of
X (Q(W s) / s)^T, where X is the sampled input and Q quantizes each matrix in its own format. The search also tries
scales that are divided by a power of the channel's largest weight; these are not in the paper.

    search = AwqSearch(config, quantize_dequantize=rounded)
    calibrate(checkpoint, sequences, search)
    search.smoothing.apply(name, block, first_row)      # before the block is quantized
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from glm4_exporters.config import Glm4Config
from glm4_exporters.quantize.calibrate import Site
from glm4_exporters.quantize.smooth import ScaleSearch, above_floor, centred, shared_by_readers

EXPONENTS = tuple(i / 10 for i in range(1, 11))


class QuantizeDequantize(Protocol):
    """Quantizes rows of a matrix and dequantizes them again."""

    def __call__(self, name: str, weight: Tensor, importance: Tensor) -> Tensor:
        """Rows [n, channels] of the matrix ``name``, and mean x^2 [channels] of its input -> rows [n, channels]."""


@dataclass
class AwqSearch(ScaleSearch):
    """Searches the scales with which ``quantize_dequantize`` changes the matrices' products least."""

    quantize_dequantize: QuantizeDequantize = field(kw_only=True)

    def candidates(self, site: Site) -> Iterable[tuple[str, Tensor]]:
        return scales_by_activations(self.config, site)

    def product(self, site: Site, scales: Tensor) -> Tensor:
        quantized = quantized_rows(self.quantize_dequantize, site, scales)
        return site.sample @ (torch.cat(quantized) / scales).T


def scales_by_activations(config: Glm4Config, site: Site) -> Iterable[tuple[str, Tensor]]:
    """The scales [channels] that AWQ tries for a site, each with its name."""
    x, w = (
        above_floor(shared_by_readers(config, site.names, size))
        for size in (torch.from_numpy(site.statistics.mean_abs), site.weight_absmax)
    )
    for exponent in EXPONENTS:
        yield f"x^{exponent:g}", centred(x**exponent)
        if exponent < 1:
            yield f"x^{exponent:g} / w^{1 - exponent:g}", centred(x**exponent / w ** (1 - exponent))


def quantized_rows(quantize_dequantize: QuantizeDequantize, site: Site, scales: Tensor) -> list[Tensor]:
    """The sampled rows of each matrix of a site, multiplied by ``scales`` and then quantized."""
    importance = torch.from_numpy(site.statistics.mean_square) / scales**2
    parts = (site.weight_sample * scales).split(site.sampled)
    return [quantize_dequantize(name, rows, importance) for name, rows in zip(site.names, parts, strict=True)]
