"""``glm4::PartialRopeGqaAttention``: inputs, outputs, and its specification in NumPy.

Shapes: B sequences, S new positions in each, C positions of the cache, Hq query heads, Hkv key-value heads, D channels
of a head, of which R are rotated.

    query          [B, S, Hq * D]     before RoPE
    key, value     [B, S, Hkv * D]    before RoPE
    past_key       [B, Hkv, C, D]     may be absent, and past_value with it: an empty past, C = S
    past_value     [B, Hkv, C, D]
    cos, sin       [positions, R / 2] with YaRN's attention factor folded in
    past_lengths   [B] int32          valid keys in the cache before this call; absent with the past
    query_lengths  [B] int32          valid tokens among S, the rest is padding on the right
    attn_output    [B, S, Hq * D]
    present_key    [B, Hkv, C, D]     the past with rows past_lengths ... past_lengths + S - 1 written
    present_value  [B, Hkv, C, D]

Row i of sequence b has the position ``past_lengths[b] + i``. The row is rotated for this position, stored at this
position, and attends to the keys ``0 ... past_lengths[b] + i``. Rows from ``query_lengths[b]`` on are unspecified in
``attn_output``. These rows write past the end of the sequence, where no row reads.

On a CPU, past and present may also be float16, bfloat16 or int8, where a row is D numbers and a float32 scale.
``cpu/attention.h`` defines these.

The operator is functional. Whether a present shares the memory of its past depends on the implementation.
:func:`partial_rope_gqa_attention` is the specification: tests compare every implementation with it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DOMAIN = "glm4"
OP_TYPE = "PartialRopeGqaAttention"
# TensorRT's plugins with an int8 or fp8 cache, which have two more inputs.
PLUGIN_INT8, PLUGIN_FP8 = f"{OP_TYPE}Int8", f"{OP_TYPE}Fp8"
VERSION = 1  # of the domain

INPUTS = (
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "cos",
    "sin",
    "past_lengths",
    "query_lengths",
)
# The specification's names of the outputs; implementations return them in this order.
OUTPUTS = ("attn_output", "present_key", "present_value")

FloatingArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class AttentionAttributes:
    """The operator's attributes, under the names that ONNX's own attention operators give them."""

    num_heads: int
    kv_num_heads: int
    rotary_embedding_dim: int
    scale: float

    def __post_init__(self) -> None:
        if self.kv_num_heads < 1 or self.num_heads % self.kv_num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of kv_num_heads {self.kv_num_heads}"
            )
        if self.rotary_embedding_dim < 0 or self.rotary_embedding_dim % 2:
            raise ValueError(f"rotary_embedding_dim {self.rotary_embedding_dim} is not an even number >= 0")


def output_shapes(
    query: tuple[int, ...],
    key: tuple[int, ...],
    past_key: tuple[int, ...] | None,
    attributes: AttentionAttributes,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape rule: shapes of ``attn_output`` and of each ``present``, from the inputs' shapes.

    Raises:
        ValueError: an input's shape does not fit the others.
    """
    if len(query) != 3 or query[2] % attributes.num_heads:
        raise ValueError(f"query {query} is not [batch, sequence, {attributes.num_heads} heads * head_size]")
    batch, sequence, width = query
    head_size = width // attributes.num_heads
    if key != (batch, sequence, attributes.kv_num_heads * head_size):
        raise ValueError(f"key {key} is not {(batch, sequence, attributes.kv_num_heads * head_size)}")
    if attributes.rotary_embedding_dim > head_size:
        raise ValueError(
            f"rotary_embedding_dim {attributes.rotary_embedding_dim} exceeds the head size {head_size}"
        )
    capacity = sequence if past_key is None else past_key[2]
    present = (batch, attributes.kv_num_heads, capacity, head_size)
    if past_key is not None and past_key != present:
        raise ValueError(f"past_key {past_key} is not {present}")
    return query, present


def rotate_interleaved(x: FloatingArray, cos: FloatingArray, sin: FloatingArray) -> FloatingArray:
    """Rotate the pairs (2i, 2i + 1) of the first ``2 * cos.shape[-1]`` dims; the others pass through.

    ``x`` [..., D]; ``cos`` and ``sin`` broadcast to [..., R / 2].
    """
    rotary_dim = 2 * cos.shape[-1]
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    rotated = x.copy()
    rotated[..., 0:rotary_dim:2] = even * cos - odd * sin
    rotated[..., 1:rotary_dim:2] = even * sin + odd * cos
    return rotated


def partial_rope_gqa_attention(
    query: FloatingArray,
    key: FloatingArray,
    value: FloatingArray,
    past_key: FloatingArray | None,
    past_value: FloatingArray | None,
    cos: FloatingArray,
    sin: FloatingArray,
    past_lengths: npt.NDArray[np.int32] | None,
    query_lengths: npt.NDArray[np.int32],
    attributes: AttentionAttributes,
) -> tuple[FloatingArray, FloatingArray, FloatingArray]:
    """The operator's meaning, computed in float64 one sequence at a time and rounded at the end.

    Rows past ``query_lengths``, which the contract leaves open, come out as NaN here, so that a test
    which reads one fails.

    Raises:
        ValueError: shapes that do not fit, or a sequence that does not fit into the cache.
    """
    _, present_shape = output_shapes(
        query.shape, key.shape, None if past_key is None else past_key.shape, attributes
    )
    batch, kv_heads, capacity, head_size = present_shape
    sequence = query.shape[1]
    group = attributes.num_heads // kv_heads
    if past_key is None or past_value is None:
        past_key = past_value = np.zeros(present_shape, query.dtype)
    if past_lengths is None:
        past_lengths = np.zeros(batch, np.int32)
    if int(past_lengths.max(initial=0)) + sequence > capacity:
        raise ValueError(
            f"{sequence} new positions after {int(past_lengths.max())} exceed the cache's capacity {capacity}"
        )
    output = np.full(query.shape, np.nan, query.dtype)
    present_key, present_value = past_key.copy(), past_value.copy()
    for b in range(batch):
        past, new = int(past_lengths[b]), int(query_lengths[b])
        c = cos[past : past + sequence, None].astype(np.float64)
        s = sin[past : past + sequence, None].astype(np.float64)
        q = query[b].reshape(sequence, -1, head_size).astype(np.float64)
        k = key[b].reshape(sequence, kv_heads, head_size).astype(np.float64)
        present_key[b, :, past : past + sequence] = rotate_interleaved(k, c, s).swapaxes(0, 1)
        present_value[b, :, past : past + sequence] = value[b].reshape(sequence, kv_heads, -1).swapaxes(0, 1)
        q = rotate_interleaved(q, c, s)
        for i in range(new):
            keys = np.repeat(present_key[b, :, : past + i + 1].astype(np.float64), group, axis=0)
            values = np.repeat(present_value[b, :, : past + i + 1].astype(np.float64), group, axis=0)
            scores = np.einsum("hd,htd->ht", q[i], keys) * attributes.scale
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            output[b, i] = np.einsum("ht,htd->hd", weights, values).reshape(-1)
    return output, present_key, present_value
