"""``glm4::PartialRopeGqaAttention`` as one Triton kernel: RoPE, cache append and causal GQA attention in one launch.

The query heads of one key-value head and the new tokens are packed into rows: row = token * GROUP + head. So one read
of the cache serves all rows. All blocks of a launch take the same branch, by the number of new tokens:

prompt  many new tokens. A block owns BLOCK_M rows, and reads all keys that the rows see: cached keys, then new keys.
extend  few new tokens, in the rows of a few blocks. All blocks share the keys.
decode  all rows fit one matrix product with 16 or 32 rows. All blocks share the keys, as in extend.

To share keys, the kernel divides the keys of each sequence into tiles, and numbers the tiles of all sequences one after
the other. Every block takes an equal range of tiles. So a range may begin or end inside a sequence. The block that
finishes last joins the partial results (pieces) of a sequence.

Blocks run in any order, so no block reads a cache row that another block appends. Each block that needs the keys of new
tokens rotates them again from ``key``. ``past_key`` and ``present_key`` are one buffer, and so are ``past_value`` and
``present_value``.

RoPE rotates the first half of each head, because GLM-4's ``partial_rotary_factor`` is 0.5. So queries and keys are
loaded as two halves: the *turning* half, which is rotated, and the *passing* half. Scores, softmax and sums are float32.

An int8 or fp8 cache has a scale per kv head and channel. The query is multiplied by the keys' scales, and the output by
the values' scales. So the loops only convert numbers, and float16 and bfloat16 represent these numbers exactly.

Shapes in the docstrings: M rows, N keys of a tile, HALF = HEAD_DIM / 2. Functions that handle one head take pointers to
the first element of that head. Positions and lengths are int32, in tokens.
"""

import triton
import triton.language as tl

from glm4_plugins.kernels.prefill import prefill
from glm4_plugins.kernels.split import split


# Sizes are not specialised, so that torch launches the same kernel that an engine contains.
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
    """The kernel's entry: inputs, sizes (int32) and outputs, in the order in which TensorRT passes them.

    The grid has one dimension; see :func:`glm4_plugins.launch.grid`. B sequences, S new tokens, T = capacity.

    Args:
        query: [B, S, KV_HEADS * GROUP * HEAD_DIM], float16 or bfloat16, as all activations.
        key, value: [B, S, KV_HEADS * HEAD_DIM].
        past_key, past_value: [B, KV_HEADS, T, HEAD_DIM], activations' type, int8 or float8_e4m3fn.
        cos, sin: [positions, HEAD_DIM / 4], activations' type, one number for each pair of rotated channels.
        past_lengths, query_lengths: int32 [B], numbers of cached and of new tokens.
        counters: int32, zero before and after the launch. ``present_counters`` is the same buffer.
        key_scale, value_scale: float32 [KV_HEADS, HEAD_DIM]. None: the cache has the activations' type.
        attn_output: as ``query``.
        partials: float32 scratch memory, see :func:`glm4_plugins.launch.partials_shape`.
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
