"""Which values would overflow fp16, and an exact scaling that prevents the overflow.

    report = audit(calibration)                  # rows for report.json
    remedy = remedies(calibration)
    remedy.weights.apply(name, block, first_row) # powers of two, for every tensor that is written
    ScaleEps(remedy.norm_bits)(model)            # before the graph is lowered

Values, o_proj's output, up, silu(gate) * up and down_proj's output are linear in the rows of a matrix. The next
operation that is not linear is a norm. If the rows are scaled by 2^-k and the norm's eps by 2^-2k, the norm's output
has the same bits, except for subnormal numbers. Attention scores, gate, the norms' outputs and the residual cannot be
scaled. If one of these overflows, fp16 is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from glm4_exporters.config import Glm4Config
from glm4_exporters.quantize.calibrate import PEAKS, Calibration, Magnitudes
from glm4_exporters.quantize.smooth import Smoothing
from glm4_runtime.errors import GateError

LIMIT = 65504.0  # the largest float16
SAFE = LIMIT / 8  # headroom, because other texts reach larger values
FIXED = ("attention_input", "scores", "mlp_input", "gate", "residual")  # values that cannot be scaled


@dataclass(frozen=True)
class LayerBits:
    """How many bits a layer's matrices are scaled down by."""

    value: int = 0
    o_proj: int = 0
    up: int = 0
    down_proj: int = 0


@dataclass(frozen=True)
class Remedy:
    """Powers of two that bring a model into fp16's range.

    Attributes:
        layers: the layers that are scaled.
        weights: the multipliers by tensor name.
    """

    layers: Mapping[int, LayerBits] = field(default_factory=dict)
    weights: Smoothing = field(default_factory=Smoothing)

    @property
    def norm_bits(self) -> dict[str, int]:
        """By norm: k. The norm's input is scaled by 2^-k, so its eps must be scaled by 2^-2k."""
        bits = {}
        for index, layer in self.layers.items():
            bits[f"model.layers.{index}.post_self_attn_layernorm"] = layer.value + layer.o_proj
            bits[f"model.layers.{index}.post_mlp_layernorm"] = layer.up + layer.down_proj
        return {norm: k for norm, k in bits.items() if k}


def audit(calibration: Calibration, smoothing: Smoothing | None = None) -> list[dict[str, float | int | str]]:
    """One row per layer: the largest absolute values, and the name of the worst."""
    rows: list[dict[str, float | int | str]] = []
    for index, found in enumerate(peaks(calibration, smoothing)):
        worst = max(found, key=lambda name: found[name])
        rows.append({"layer": index, **found, "worst": worst, "of_limit": found[worst] / LIMIT})
    return rows


def peaks(calibration: Calibration, smoothing: Smoothing | None = None) -> list[dict[str, float]]:
    """The largest values per layer; of the smoothed model if ``smoothing`` is given.

    Then ``up`` is an upper bound, because it has no statistics per channel.
    """
    smoothing = smoothing or Smoothing()
    found = []
    for index, layer in enumerate(calibration.layers):
        scope = f"model.layers.{index}."
        width = len(layer.sites["down_proj"].absmax)
        rows = smoothing.rows.get(f"{scope}mlp.gate_up_proj.weight")
        changed = {
            "attention_input": smoothing.input_absmax(calibration, f"{scope}self_attn.q_proj.weight").max(),
            "value": smoothing.value_absmax(calibration, index).max(),
            "mlp_input": smoothing.input_absmax(calibration, f"{scope}mlp.gate_up_proj.weight").max(),
            "up": layer.peaks["up"] * (1.0 if rows is None else rows[width:].max()),
            "product": smoothing.input_absmax(calibration, f"{scope}mlp.down_proj.weight").max(),
        }
        found.append({name: float(changed.get(name, layer.peaks[name])) for name in PEAKS})
    return found


def remedies(calibration: Calibration, config: Glm4Config, smoothing: Smoothing | None = None) -> Remedy:
    """The smallest powers of two that keep all values that can be scaled below ``SAFE``."""
    layers = {}
    for index, found in enumerate(peaks(calibration, smoothing)):
        value, up = _bits(found["value"]), _bits(max(found["up"], found["product"]))
        layers[index] = LayerBits(
            value=value,
            o_proj=max(0, _bits(found["o_proj"]) - value),
            up=up,
            down_proj=max(0, _bits(found["down_proj"]) - up),
        )
    layers = {index: bits for index, bits in layers.items() if bits != LayerBits()}
    rows: dict[str, Magnitudes] = {}
    for index, bits in layers.items():
        scope = f"model.layers.{index}."
        keys = config.num_key_value_heads * config.head_dim
        hidden, width = config.hidden_size, config.intermediate_size
        kinds = ("weight", "bias") if config.attention_bias else ("weight",)
        exponents = {f"{scope}self_attn.v_proj.{kind}": torch.full((keys,), -bits.value) for kind in kinds}
        exponents |= {
            f"{scope}self_attn.o_proj.weight": torch.full((hidden,), -bits.o_proj),
            f"{scope}mlp.gate_up_proj.weight": torch.tensor([0, -bits.up]).repeat_interleave(width),
            f"{scope}mlp.down_proj.weight": torch.full((hidden,), -bits.down_proj),
        }
        rows |= {name: torch.exp2(k.float()).numpy() for name, k in exponents.items() if k.any()}
    return Remedy(layers, Smoothing(rows))


def require_range(calibration: Calibration, smoothing: Smoothing | None = None) -> None:
    """Refuse fp16 if scores, gate, norm outputs or residual overflow.

    Raises:
        GateError: names the layers and the values that overflow.
    """
    found = [
        f"{name} of layer {index} ({largest[name]:.4g})"
        for index, largest in enumerate(peaks(calibration, smoothing))
        for name in FIXED
        if largest[name] > LIMIT
    ]
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise GateError(
            f"beyond float16's {LIMIT:g} on the calibration text: {', '.join(found[:4])}{more}; no scaling of "
            "weights mends these: use bf16 or fp32 activations"
        )


def _bits(largest: float) -> int:
    return max(0, math.ceil(math.log2(largest / SAFE))) if largest > 0 else 0
