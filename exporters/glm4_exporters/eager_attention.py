"""Eager attention of the reference model, with an explicit mask and a cache. Shapes as in ``reference.py``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from glm4_exporters.config import Glm4Config
from glm4_exporters.reference import rotate


class KVCache:
    """Rotated keys, and values, of every layer, each [B, Hkv, T, D]. Each call of a model extends it."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.layers = list(layers)

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            past_key, past_value = self.layers[layer]
            self.layers[layer] = torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)
        return self.layers[layer]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@dataclass
class Attention:
    """Eager attention with an explicit mask. The softmax is float32, and is rounded before the product with the
    values."""

    config: Glm4Config
    cos: Tensor  # [B or 1, 1, S, R / 2]
    sin: Tensor
    mask: Tensor  # bool [B or 1, 1, S, T], True where a key is seen
    cache: KVCache | None
    dropout: float = 0.0
    maps: list[Tensor] | None = None  # if not None: receives [B, Hq, S, T] per layer

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        size = self.config.head_dim
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (query, key, value))
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        if self.cache is not None:
            k, v = self.cache.append(layer, k, v)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = (q @ k.transpose(2, 3)) * self.config.scale
        # The finite minimum instead of -inf: a row of padding without visible keys stays finite.
        scores = scores.masked_fill(~self.mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        if self.maps is not None:
            self.maps.append(weights)
        weights = F.dropout(weights, self.dropout, training=self.dropout > 0)
        return (weights @ v).transpose(1, 2).flatten(-2)
