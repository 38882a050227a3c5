"""Factors of the keys for an int8 cache with a scale in each row, from the weights alone.

A row of the cache has one scale for all channels of a head. If one channel is large in every key, such as by its bias,
it would take the other channels' precision. So keys are divided by a factor per channel before they are rounded, and
queries are multiplied by this factor: the products stay the same.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from glm4_exporters.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SHARE = 1e-2  # lower bound, as a share of the head's largest factor


def key_factors(source: Checkpoint) -> tuple[npt.NDArray[np.float32], ...]:
    """The factors of every layer, float32 [Hkv, D]; the largest of a head is 1.

    A factor is the root mean square of a key's channel, if the channels of the norm's output without its weight are
    independent and have variance 1: sqrt(|W_d * g|^2 + b_d^2), with g the weight of the norm. The two channels of a
    rotated pair share their mean, because a rotation mixes them.
    """
    return tuple(_of_layer(source, layer) for layer in range(source.config.num_hidden_layers))


def _of_layer(source: Checkpoint, layer: int) -> npt.NDArray[np.float32]:
    config, scope = source.config, f"model.layers.{layer}"

    def read(name: str) -> "Tensor":
        return source.read(f"{scope}.{name}").double()

    power = (read("self_attn.k_proj.weight") * read("input_layernorm.weight")).square().sum(1)
    if config.attention_bias:
        power = power + read("self_attn.k_proj.bias").square()
    heads = power.view(config.num_key_value_heads, config.head_dim).numpy()
    pairs = heads[:, : config.rotary_dim].reshape(len(heads), -1, 2)
    heads[:, : config.rotary_dim] = pairs.mean(-1).repeat(2, -1)
    factors = np.sqrt(heads)
    largest = np.maximum(factors.max(-1, keepdims=True), np.finfo(np.float32).tiny)
    found: npt.NDArray[np.float32] = np.maximum(factors / largest, SMALLEST_SHARE).astype(np.float32)
    return found
