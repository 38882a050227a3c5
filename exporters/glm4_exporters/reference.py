"""GLM-4-0414 in plain PyTorch: the reference model. Every bundle is compared with it, and the export traces it.

This file is the architecture. ``eager_attention.py`` has attention with a cache, and ``task_models.py`` the heads, losses
and outputs. Parameter names are the checkpoint's. Shapes: B sequences, S new positions, T keys, H hidden, Hq and Hkv
heads of size D, R rotated dims of D.
"""

import math
from collections.abc import Generator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm4_exporters.config import Glm4Config


class Attend(Protocol):
    """Attention between the projections. An object may have a cache, or build a graph."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """query [B, S, Hq * D], key and value [B, S, Hkv * D], before RoPE -> [B, S, Hq * D]."""


class Glm4RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, rounded to the input's type, times the weight [H]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def inverse_frequencies(config: Glm4Config) -> tuple[Tensor, float]:
    """Frequencies [R / 2] in float32, and the factor on cos and sin.

    ``default``: theta^(-2i / R), factor 1. ``yarn``: sections 3.2 and 3.4 of "YaRN: Efficient Context Window
    Extension of Large Language Models" (Peng et al., 2023). A frequency that turns less than beta_slow times in the
    original context is divided by ``factor``. A frequency that turns more than beta_fast times is kept. Between the
    two is a linear ramp.
    """
    rope, dim = config.rope, config.rotary_dim
    wavelengths = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.rope_type == "default":
        return 1.0 / wavelengths, 1.0

    original, factor = rope.original_max_position_embeddings, rope.factor
    assert original is not None
    assert factor is not None

    def dim_turning(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_turning(rope.beta_fast), dim_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0  # avoids a division by zero
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - interpolated
    frequencies = (1.0 / (factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequencies, mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return frequencies, mscale(1.0)


def rotary_tables(config: Glm4Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin in float32, [*positions.shape, R / 2], on the positions' device; YaRN's factor is in them."""
    frequencies, factor = inverse_frequencies(config)
    angles = positions[..., None].float() * frequencies.to(positions.device)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of the first R dims of x [B, heads, S, D]; the other dims are unchanged."""
    rotary_dim = 2 * cos.shape[-1]
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


class Glm4Attention(nn.Module):
    def __init__(self, config: Glm4Config, layer: int) -> None:
        super().__init__()
        hidden, size, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer = layer
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias=False)  # never a bias

    def forward(self, x: Tensor, attend: Attend) -> Tensor:  # [B, S, H] -> [B, S, H]
        projected: Tensor = self.o_proj(self.attended(x, attend))
        return projected

    def attended(self, x: Tensor, attend: Attend) -> Tensor:  # [B, S, H] -> [B, S, Hq * D]
        return attend(self.layer, self.q_proj(x), self.k_proj(x), self.v_proj(x))


class Glm4MLP(nn.Module):
    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.width = config.intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * self.width, bias=False)  # gate rows first
        self.down_proj = nn.Linear(self.width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(self.product(x))
        return down

    def product(self, x: Tensor) -> Tensor:  # silu(gate) * up
        gate, up = self.gate_up_proj(x).split([self.width, self.width], dim=-1)
        gated: Tensor = F.silu(gate) * up
        return gated


class Glm4DecoderLayer(nn.Module):
    """Sandwich norms: each half normalises its input, and its output before the residual is added."""

    def __init__(self, config: Glm4Config, layer: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Glm4Attention(config, layer)
        self.mlp = Glm4MLP(config)
        self.input_layernorm = Glm4RMSNorm(hidden, eps)
        self.post_self_attn_layernorm = Glm4RMSNorm(hidden, eps)
        self.post_attention_layernorm = Glm4RMSNorm(hidden, eps)  # the MLP's input norm, despite its name
        self.post_mlp_layernorm = Glm4RMSNorm(hidden, eps)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.after_attention(x, self.self_attn(self.input_layernorm(x), attend))
        return self.after_mlp(x, self.mlp(self.post_attention_layernorm(x)))

    def after_attention(self, x: Tensor, projected: Tensor) -> Tensor:
        residual: Tensor = x + self.post_self_attn_layernorm(projected)
        return residual

    def after_mlp(self, x: Tensor, down: Tensor) -> Tensor:
        residual: Tensor = x + self.post_mlp_layernorm(down)
        return residual

    def sites(self, x: Tensor, attend: Attend) -> Generator[Tensor]:
        """:meth:`forward` in steps. Yields the input of each of ``architecture.LAYER_SITES``, in order, then the
        layer's output.

        The caller may change weights between two steps. Inputs that no later step reads are freed.
        """
        read = self.input_layernorm(x)
        yield read
        read = self.self_attn.attended(read, attend)
        yield read
        x = self.after_attention(x, self.self_attn.o_proj(read))
        read = self.post_attention_layernorm(x)
        yield read
        read = self.mlp.product(read)
        yield read
        yield self.after_mlp(x, self.mlp.down_proj(read))


class Glm4Backbone(nn.Module):
    """Embedding, layers and final norm; no head."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(Glm4DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Glm4RMSNorm(config.hidden_size, config.rms_norm_eps)

    def run(self, hidden: Tensor, attend: Attend) -> Tensor:
        """Embeddings [B, S, H] -> normed hidden states [B, S, H]."""
        for layer in self.layers:
            hidden = layer(hidden, attend)
        normed: Tensor = self.norm(hidden)
        return normed
