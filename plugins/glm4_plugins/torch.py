"""``glm4::partial_rope_gqa_attention`` as a torch operator: the Triton kernel on a GPU, plain tensor operations
elsewhere.

Importing this module registers ``torch.ops.glm4.partial_rope_gqa_attention``. It is functional, because
``torch.export`` does not support an operator that mutates its inputs. :mod:`glm4_plugins.torch_kernel` has the
kernel, which updates the caches in place.
"""

import torch
from torch import Tensor

from glm4_plugins.launch import unsupported
from glm4_plugins.operator import AttentionAttributes, output_shapes
from glm4_plugins.torch_kernel import kernel_shape, launch_attention


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of the first R dims of ``x`` [B, H, S, D] by ``cos``, ``sin`` [B, 1, S, R / 2]."""
    rotary_dim = 2 * cos.shape[-1]
    pairs = x[..., :rotary_dim].unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((rotated.flatten(-2), x[..., rotary_dim:]), dim=-1)


def _checked(
    query: Tensor,
    key: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    cos: Tensor,
    past_lengths: Tensor | None,
    query_lengths: Tensor,
    attributes: AttentionAttributes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the shapes; returns ``past_lengths``, and copies of the caches to write into."""
    if 2 * cos.shape[-1] != attributes.rotary_embedding_dim:
        raise ValueError(
            f"cos has {cos.shape[-1]} columns, not rotary_embedding_dim / 2 = {attributes.rotary_embedding_dim // 2}"
        )
    _, present_shape = output_shapes(
        tuple(query.shape), tuple(key.shape), None if past_key is None else tuple(past_key.shape), attributes
    )
    sequence, capacity = query.shape[1], present_shape[2]
    if past_lengths is None:
        past_lengths = torch.zeros_like(query_lengths)
    if sequence and int(past_lengths.max()) + sequence > capacity:
        raise ValueError(
            f"{sequence} new positions after {int(past_lengths.max())} exceed the cache's capacity {capacity}"
        )
    if past_key is None or past_value is None:
        return past_lengths, query.new_zeros(present_shape), query.new_zeros(present_shape)
    # The kernel needs contiguous caches, and writes into them.
    layout = torch.contiguous_format
    return past_lengths, past_key.clone(memory_format=layout), past_value.clone(memory_format=layout)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    present_key: Tensor,
    present_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_lengths: Tensor,
    query_lengths: Tensor,
    attributes: AttentionAttributes,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, sequence, _ = query.shape
    num_heads, kv_num_heads, scale = attributes.num_heads, attributes.kv_num_heads, attributes.scale
    capacity, head_size = present_key.shape[2:]
    steps = torch.arange(sequence, device=query.device)
    positions = past_lengths.long()[:, None] + steps  # [B, S]
    # Padding may lie beyond the last row of the tables; its rotation is never read.
    rows = positions.clamp(max=cos.shape[0] - 1)
    cos_at, sin_at = cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)  # [B, 1, S, R / 2]
    q = query.unflatten(-1, (num_heads, head_size)).transpose(1, 2)
    k = key.unflatten(-1, (kv_num_heads, head_size)).transpose(1, 2)
    v = value.unflatten(-1, (kv_num_heads, head_size)).transpose(1, 2)
    index = positions[:, None, :, None].expand(batch, kv_num_heads, sequence, head_size)
    present_key = present_key.scatter(2, index, rotate_interleaved(k, cos_at, sin_at))
    present_value = present_value.scatter(2, index, v)
    q = rotate_interleaved(q, cos_at, sin_at).unflatten(1, (kv_num_heads, -1))  # [B, Hkv, G, S, D]
    scores = torch.einsum("bhgsd,bhtd->bhgst", q.float(), present_key.float()) * scale
    visible = torch.arange(capacity, device=query.device) <= positions[..., None]  # [B, S, C]
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    # A cache row that was never written may contain NaN, and zero times NaN is not zero.
    live = torch.arange(capacity, device=query.device) < (past_lengths.long() + sequence)[:, None]
    values = present_value.float().masked_fill(~live[:, None, :, None], 0.0)
    output = torch.einsum("bhgst,bhtd->bhgsd", scores.softmax(dim=-1), values)
    output = output.permute(0, 3, 1, 2, 4).reshape(query.shape)
    valid = steps < query_lengths.long()[:, None]
    return output.masked_fill(~valid[..., None], 0.0).to(query.dtype), present_key, present_value


@torch.library.custom_op("glm4::partial_rope_gqa_attention", mutates_args=())
def partial_rope_gqa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    past_lengths: Tensor | None,
    query_lengths: Tensor,
    num_heads: int,
    kv_num_heads: int,
    rotary_embedding_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`glm4_plugins.operator` for shapes and meaning. Rows beyond ``query_lengths`` become zeros.

    Scores and softmax are float32 for every input type.

    Raises:
        ValueError: shapes that do not fit, or a sequence that does not fit into the cache.
    """
    attributes = AttentionAttributes(num_heads, kv_num_heads, rotary_embedding_dim, scale)
    past_lengths, present_key, present_value = _checked(
        query, key, past_key, past_value, cos, past_lengths, query_lengths, attributes
    )
    return _plain(
        query, key, value, present_key, present_value, cos, sin, past_lengths, query_lengths, attributes
    )


@partial_rope_gqa_attention.register_kernel("cuda")
def with_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    past_lengths: Tensor | None,
    query_lengths: Tensor,
    num_heads: int,
    kv_num_heads: int,
    rotary_embedding_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator with the Triton kernel, or with plain tensors if the kernel does not support the shape or type."""
    attributes = AttentionAttributes(num_heads, kv_num_heads, rotary_embedding_dim, scale)
    past_lengths, present_key, present_value = _checked(
        query, key, past_key, past_value, cos, past_lengths, query_lengths, attributes
    )
    if unsupported(kernel_shape(query, present_key, attributes), rotary_embedding_dim):
        return _plain(
            query, key, value, present_key, present_value, cos, sin, past_lengths, query_lengths, attributes
        )
    query, key, value, cos, sin, past_lengths, query_lengths = (
        tensor.contiguous() for tensor in (query, key, value, cos, sin, past_lengths, query_lengths)
    )
    output = launch_attention(
        query, key, value, present_key, present_value, cos, sin, past_lengths, query_lengths, attributes
    )
    return output, present_key, present_value


@partial_rope_gqa_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    past_lengths: Tensor | None,
    query_lengths: Tensor,
    num_heads: int,
    kv_num_heads: int,
    rotary_embedding_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, sequence, _ = query.shape
    capacity = sequence if past_key is None else past_key.shape[2]
    present = query.new_empty((batch, kv_num_heads, capacity, query.shape[2] // num_heads))
    return torch.empty_like(query), present, torch.empty_like(present)
