"""The Triton kernel on torch tensors, on a GPU or in Triton's interpreter. Updates the caches in place."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from glm4_plugins.launch import (
    CAPABILITIES,
    IntegerMath,
    KernelShape,
    Tiles,
    choices,
    constants,
    counters_shape,
    grid,
    partials_shape,
    unsupported,
)
from glm4_plugins.operator import AttentionAttributes

_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_QUANTIZED = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@dataclass
class Workspace:
    """Additional memory of a launch: counters, which are zero between launches, and scratch."""

    counters: Tensor
    partials: Tensor

    @classmethod
    def make(cls, shape: KernelShape, tiles: Tiles, device: torch.device) -> "Workspace":
        counters = torch.zeros(counters_shape(tiles), dtype=torch.int32, device=device)
        return cls(counters, torch.empty(partials_shape(shape, tiles), device=device))


def kernel_shape(
    query: Tensor, past_key: Tensor, attributes: AttentionAttributes, phase: str = "shared"
) -> KernelShape:
    """The kernel's shape for these tensors."""
    return KernelShape(
        attributes.num_heads,
        attributes.kv_num_heads,
        past_key.shape[3],
        attributes.scale,
        max_batch=query.shape[0],
        dtype=_DTYPES.get(query.dtype, str(query.dtype)),
        quantized_cache=past_key.dtype in _QUANTIZED,
        phase=phase,
        quantized_dtype=_QUANTIZED.get(past_key.dtype, "int8"),
    )


def known_capability(device: torch.device) -> int:
    """A GPU's compute capability, or the next lower one with block sizes."""
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    return max((c for c in CAPABILITIES if c <= capability), default=capability)


@lru_cache
def device_choices(device: torch.device, quantized_cache: bool = False) -> tuple[Tiles, ...]:
    """The choices of block sizes for a GPU and its number of processors."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return choices(known_capability(device), quantized_cache, processors)


def launch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_lengths: Tensor,
    query_lengths: Tensor,
    attributes: AttentionAttributes,
    *,
    tiles: Tiles | None = None,
    workspace: Workspace | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    out: Tensor | None = None,
    phase: str = "shared",
) -> Tensor:
    """``attn_output``; the new keys and values are written into ``past_key`` and ``past_value``.

    An int8 or fp8 cache needs ``key_scale`` and ``value_scale`` [kv_num_heads, head_dim] in float32. Without a
    ``workspace``, the call allocates one, which costs more than a decode step.

    Raises:
        ValueError: tensors that the kernel does not support.
    """
    from glm4_plugins.kernels import partial_rope_gqa_attention

    shape = kernel_shape(query, past_key, attributes, phase)
    refusal = unsupported(shape, attributes.rotary_embedding_dim)
    if refusal:
        raise ValueError(refusal)
    if phase == "decode" and query.shape[1] > shape.decode_tokens:
        raise ValueError(
            f"{query.shape[1]} new tokens; a decode kernel for this shape takes {shape.decode_tokens}"
        )
    if shape.quantized_cache != (key_scale is not None) or shape.quantized_cache != (value_scale is not None):
        raise ValueError("an int8 or fp8 cache comes with key_scale and value_scale, and no other does")
    tensors = (query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths)
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("the kernel takes contiguous tensors only")
    tiles = tiles or device_choices(query.device, shape.quantized_cache)[0]
    workspace = workspace or Workspace.make(shape, tiles, query.device)
    out = torch.empty_like(query) if out is None else out
    batch, sequence, capacity = query.shape[0], query.shape[1], past_key.shape[2]
    blocks = grid(shape, tiles, batch, sequence, capacity, IntegerMath())
    partial_rope_gqa_attention[(blocks,)](
        query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths, workspace.counters,
        key_scale, value_scale, batch, sequence, capacity,
        out, past_key, past_value, workspace.counters, workspace.partials,
        **constants(shape, tiles), num_warps=tiles.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out
