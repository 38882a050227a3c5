"""Smoothing: scales per channel that move large values from activations to weights.

A matrix computes X W^T = (X / s) (W s)^T for any s > 0 per channel. In this architecture the operation before the
matrix can produce X / s instead of X, so the graph stays the same:

    site       operation before the matrix                              tensor that is divided by s
    qkv        input_layernorm                                          its weight
    o_proj     values, averaged by attention: one s per channel of a    v_proj's rows and bias
               KV head, shared by the query heads that read it
    gate_up    post_attention_layernorm                                 its weight
    down_proj  silu(gate) * up, linear in up                            the second half of gate_up's rows
    lm_head    model.norm, if the head is not tied                      its weight

:class:`Smoothing` has the multipliers by tensor name, and the writer of weights applies them to blocks of rows.
:class:`SmoothQuant` is a consumer of ``calibrate`` that chooses s for W8A8:

    search = SmoothQuant(config)
    calibration = calibrate(checkpoint, sequences, search)
    search.smoothing.apply(name, block, first_row)      # for every tensor that is written
    search.smoothing.input_absmax(calibration, name)    # largest inputs of the smoothed model's matrix

Equation 4 of "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (Xiao et al.,
2022) gives the scales. Alpha is chosen per site, by the least error of the quantized product.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from glm4_exporters.architecture import HEAD
from glm4_exporters.config import Glm4Config
from glm4_exporters.formats.base import INT8_MAX
from glm4_exporters.quantize.calibrate import Calibration, Magnitudes, Site

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FLOOR = 1e-4  # lower bound, as a share of the largest channel: a channel near 0 in the calibration may be larger later
# Scales are 1 / LARGEST_SCALE ... LARGEST_SCALE, so that norm weights keep their digits in fp16.
LARGEST_SCALE = 2.0**12


@dataclass(frozen=True)
class Smoothing:
    """Multipliers per row and per column of tensors, by canonical name. Other tensors stay unchanged.

    A vector (norm weight, bias) has rows only.
    """

    rows: Mapping[str, Magnitudes] = field(default_factory=dict)
    columns: Mapping[str, Magnitudes] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Every tensor that is scaled."""
        return {*self.rows, *self.columns}

    def apply(self, name: str, block: Tensor, first_row: int) -> Tensor:
        """Scale the rows of a tensor from ``first_row`` on. Returns float32, or ``block`` if the tensor has no scale."""
        if name in self.columns:
            block = block.float() * torch.from_numpy(self.columns[name])
        if name in self.rows:
            part = torch.from_numpy(self.rows[name][first_row : first_row + len(block)])
            block = block.float() * part.view(-1, *[1] * (block.dim() - 1))
        return block

    def then(self, other: "Smoothing") -> "Smoothing":
        """This smoothing followed by another."""
        return Smoothing(_product(self.rows, other.rows), _product(self.columns, other.columns))

    def input_absmax(self, calibration: Calibration, name: str) -> Magnitudes:
        """The largest |x| per channel of the input of the matrix ``name``, in the smoothed model."""
        return calibration.input_of(name).absmax / self.columns.get(name, np.float32(1))

    def value_absmax(self, calibration: Calibration, layer: int) -> Magnitudes:
        """The largest |V| per KV head and channel [Hkv, D], in the smoothed model."""
        values = calibration.layers[layer].value_absmax
        rows = self.rows.get(f"model.layers.{layer}.self_attn.v_proj.weight")
        return values if rows is None else values * rows.reshape(values.shape)


def fold(config: Glm4Config, names: tuple[str, ...], scales: Tensor) -> Smoothing:
    """Multiply the columns of a site's matrices by ``scales`` [channels], and divide the weights that produce their
    input.

    ``scales`` of o_proj must be equal among the query heads of a group: see :func:`shared_by_readers`.
    """
    columns = dict.fromkeys(names, scales.numpy())
    divisor = 1 / scales
    scope, _, matrix = names[0].removesuffix(".weight").rpartition(".")
    layer = scope.rpartition(".")[0]
    if matrix == "o_proj":
        group = config.num_attention_heads // config.num_key_value_heads
        per_value = divisor.view(config.num_key_value_heads, group, -1)[:, 0].reshape(-1).numpy()
        kinds = ("weight", "bias") if config.attention_bias else ("weight",)
        return Smoothing({f"{scope}.v_proj.{kind}": per_value for kind in kinds}, columns)
    if matrix == "down_proj":
        both_halves = torch.cat((torch.ones_like(divisor), divisor)).numpy()
        return Smoothing({f"{scope}.gate_up_proj.weight": both_halves}, columns)
    norm = {
        "q_proj": f"{layer}.input_layernorm.weight",
        "gate_up_proj": f"{layer}.post_attention_layernorm.weight",
        "lm_head": "model.norm.weight",
    }[matrix]
    return Smoothing({norm: divisor.numpy()}, columns)


def foldable(config: Glm4Config, names: tuple[str, ...]) -> bool:
    """Whether the site's input can be scaled at no cost. False for a tied head, because it is the embedding."""
    return not (config.tie_word_embeddings and names == (HEAD,))


def shared_by_readers(config: Glm4Config, names: tuple[str, ...], largest: Tensor) -> Tensor:
    """Per channel, the maximum over the channels that must share one scale: for o_proj, over the query heads of a
    group."""
    if not names[0].endswith("o_proj.weight"):
        return largest
    grouped = largest.view(config.num_key_value_heads, -1, config.head_dim)
    return grouped.amax(1, keepdim=True).expand_as(grouped).reshape(-1)


def centred(scales: Tensor) -> Tensor:
    """Normalise scales so that the smallest is the inverse of the largest, within 1 / LARGEST_SCALE ... LARGEST_SCALE."""
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)


def above_floor(size: Tensor) -> Tensor:
    """Sizes per channel, bounded from below."""
    return size.clamp(min=max(FLOOR * float(size.max()), torch.finfo(torch.float32).tiny))


@dataclass(frozen=True)
class Choice:
    """The scales found for a site, with the squared relative error of its product before and after.

    ``method`` names the formula of the scales and its exponent; ``none`` if no scales were better.
    """

    names: tuple[str, ...]
    method: str
    error_before: float
    error: float


@dataclass
class ScaleSearch:
    """A consumer of ``calibrate`` that tries several scales for each site, and keeps the scales with the least error.

    Attributes:
        config: of the checkpoint.
        wanted: (names of a site's matrices) -> whether to scale the site.
        smoothing: the scales found so far, folded.
        choices: the choice at each site, in the order of the walk.
    """

    config: Glm4Config
    wanted: Callable[[tuple[str, ...]], bool] = lambda _names: True
    smoothing: Smoothing = field(default_factory=Smoothing, init=False)
    choices: list[Choice] = field(default_factory=list, init=False)

    def __call__(self, site: Site) -> None:
        if not (foldable(self.config, site.names) and self.wanted(site.names)):
            return
        exact = site.sample @ site.weight_sample.T

        def error_of(scales: Tensor) -> float:
            return relative_error(self.product(site, scales), exact)

        best_scales, method = torch.ones(site.sample.shape[1]), "none"
        before = best = error_of(best_scales)
        for name, candidate in self.candidates(site):
            if (error := error_of(candidate)) < best:
                best, best_scales, method = error, candidate, name
        self.choices.append(Choice(site.names, method, before, best))
        if method != "none":
            self.smoothing = self.smoothing.then(fold(self.config, site.names, best_scales))

    def candidates(self, site: Site) -> Iterable[tuple[str, Tensor]]:
        """Scales [channels] to try, each with the name of how it was made."""
        raise NotImplementedError

    def product(self, site: Site, scales: Tensor) -> Tensor:
        """The quantized product of the site's samples under ``scales``: [tokens, sampled rows]."""
        raise NotImplementedError


class SmoothQuant(ScaleSearch):
    """Scales for 8-bit weights per row and 8-bit activations per token."""

    def candidates(self, site: Site) -> Iterable[tuple[str, Tensor]]:
        x, w = (
            above_floor(shared_by_readers(self.config, site.names, size))
            for size in (torch.from_numpy(site.statistics.absmax), site.weight_absmax)
        )
        for alpha in ALPHAS:
            yield f"alpha {alpha}", centred(x**alpha / w ** (1 - alpha))

    def product(self, site: Site, scales: Tensor) -> Tensor:
        return int8_per_row(site.sample / scales) @ int8_per_row(site.weight_sample * scales).T


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Squared error of products [tokens, rows], relative per token, because a norm precedes or follows each product."""
    return float(((found - exact).square().sum(1) / above_floor(exact.square().sum(1))).mean())


def int8_per_row(x: Tensor) -> Tensor:
    """Round x [rows, channels] to 255 symmetric steps per row, and back."""
    step = x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX
    return int8_values(x, step)


def int8_values(x: Tensor, step: float | Tensor) -> Tensor:
    """Round x to 255 multiples of ``step``, and back."""
    return (x / step).round().clamp(-INT8_MAX, INT8_MAX) * step


def _product(one: Mapping[str, Magnitudes], other: Mapping[str, Magnitudes]) -> dict[str, Magnitudes]:
    both = one.keys() & other.keys()
    return {**one, **other, **{name: one[name] * other[name] for name in both}}
