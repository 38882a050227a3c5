"""``glm4::PartialRopeGqaAttention`` as one Triton kernel: RoPE, cache append and causal GQA attention in one launch.

The query heads of one key-value head and the new tokens are packed into rows, row = token * GROUP + head, so
that one read of the cache serves all of them. A branch on the sequence length, the same in every block, picks:

prompt  many new tokens: a block owns BLOCK_M rows and walks over the keys before them: the cache, then the new ones.
extend  few new tokens, in the rows of a few blocks: the keys before them are shared among all blocks.
decode  all rows fit one product of 16 or 32: the keys are shared as in extend.

Where keys are shared, those of all sequences are laid end to end in tiles, and every block takes an equal share,
wherever it begins; pieces of a sequence are joined by the block that ends last.

Blocks of one launch run in any order, so none reads a cache row that another appends: the keys of new tokens
are rotated again from ``key`` by each block that needs them. ``past_key`` and ``present_key`` are one buffer,
as are ``past_value`` and ``present_value``.

RoPE turns the first half of each head (GLM-4's ``partial_rotary_factor`` is 0.5), so queries and keys are held
as two halves, and only the first goes through registers. Scores, softmax and sums are float32.

An int8 or fp8 cache has a scale per (kv head, channel). The keys' scales are folded into the query and the values'
into the output, so that the loops only convert numbers, which float16 and bfloat16 hold exactly.
"""

import triton
import triton.language as tl

from glm4_plugins.kernels.prefill import prefill
from glm4_plugins.kernels.split import split


# Sizes are not specialised, so that torch launches the very kernel that an engine holds.
@triton.jit(do_not_specialize=["batch", "sequence", "capacity"])
def partial_rope_gqa_attention(
    query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths, counters,
    key_scale, value_scale, batch, sequence, capacity,
    attn_output, present_key, present_value, present_counters, partials,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    MAX_BATCH: tl.constexpr, PHASE: tl.constexpr,
    ROWS: tl.constexpr, APPEND_N: tl.constexpr, MIN_TILES: tl.constexpr, EXTEND_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    EXTEND_N: tl.constexpr, EXTEND_STAGES: tl.constexpr, DECODE_N: tl.constexpr, DECODE_STAGES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The entry: inputs, int32 sizes, outputs, in the order in which TensorRT passes them.

    The grid has one dimension; see :func:`glm4_plugins.launch.grid`. ``counters`` int32 are zero before and
    after; ``present_counters`` is the same buffer. ``partials`` is scratch.
    """
    decoding = sequence * GROUP <= ROWS if PHASE == 0 else PHASE == 2
    extending = sequence <= EXTEND_TOKENS if PHASE <= 1 else PHASE == 3
    if decoding:
        split(
            query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths, counters,
            key_scale, value_scale, batch, sequence, capacity, attn_output, present_key, present_value, partials,
            GROUP, KV_HEADS, HEAD_DIM, SCALE, MAX_BATCH, ROWS, DECODE_N, DECODE_STAGES, MIN_TILES,
            True, APPEND_N, AT_ONCE,
        )  # fmt: skip
    elif extending:
        split(
            query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths, counters,
            key_scale, value_scale, batch, sequence, capacity, attn_output, present_key, present_value, partials,
            GROUP, KV_HEADS, HEAD_DIM, SCALE, MAX_BATCH, BLOCK_M, EXTEND_N, EXTEND_STAGES, MIN_TILES,
            False, APPEND_N, 1,
        )  # fmt: skip
    else:
        prefill(
            query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths,
            key_scale, value_scale, batch, sequence, capacity, attn_output, present_key, present_value,
            GROUP, KV_HEADS, HEAD_DIM, SCALE, BLOCK_M, BLOCK_N, APPEND_N, STAGES,
        )  # fmt: skip
