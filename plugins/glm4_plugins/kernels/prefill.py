"""Prefill: many new tokens. A block owns rows and reads the keys tile by tile."""

import triton
import triton.language as tl

from glm4_plugins.kernels.steps import (
    LOWEST,
    append,
    attend_to_cache,
    attend_to_new,
    clamped,
    new_tokens,
    queries,
    write_output,
)


@triton.jit
def prefill(
    query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths, key_scale, value_scale,
    batch, sequence, capacity, attn_output, present_key, present_value,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, APPEND_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M rows of one sequence and kv head: over the cached keys, then over the new keys.

    One block per BLOCK_M rows, sequence and kv head. Arguments as of the kernel's entry.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    KV_ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    # The last rows see the most keys. Their blocks start first, so that the longest work does not start late.
    items = batch * KV_HEADS
    program = tl.program_id(0)
    block = tl.cdiv(sequence * GROUP, BLOCK_M) - 1 - program // items
    b = (program % items) // KV_HEADS
    h = program % KV_HEADS
    past, new = clamped(tl.load(past_lengths + b), tl.load(query_lengths + b), sequence, capacity)
    first_row = block * BLOCK_M
    first_token = first_row // GROUP
    token_end = tl.minimum((first_row + BLOCK_M - 1) // GROUP + 1, new)

    # A cache can hold more elements than 32 bits count; one head of it cannot.
    cache_head = (b * KV_HEADS + h).to(tl.int64) * capacity * HEAD_DIM
    new_head = b.to(tl.int64) * sequence * KV_ROW + h * HEAD_DIM
    query_head = (b.to(tl.int64) * sequence * KV_HEADS + h) * GROUP * HEAD_DIM
    if key_scale is not None:
        key_scale += h * HEAD_DIM
        value_scale += h * HEAD_DIM
    append_rows(
        key + new_head, value + new_head, cos, sin, key_scale, value_scale,
        present_key + cache_head, present_value + cache_head, first_row, past, new,
        BLOCK_M, APPEND_N, GROUP, HALF, KV_ROW,
    )  # fmt: skip

    rows = first_row + tl.arange(0, BLOCK_M)
    q_turning, q_passing = queries(
        query + query_head, cos, sin, key_scale, rows, past, new, BLOCK_M, HALF, GROUP, GROUP * KV_ROW
    )
    total, acc = attend_to_all(
        q_turning, q_passing, key, value, past_key, past_value, cos, sin, key_scale, value_scale,
        new_head, cache_head, rows, first_token, token_end, past, new,
        GROUP, KV_HEADS, HEAD_DIM, SCALE, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip
    write_output(
        attn_output + query_head, value_scale, rows, new, sequence, total, acc, HALF, GROUP, GROUP * KV_ROW
    )


@triton.jit
def attend_to_all(
    q_turning, q_passing, key, value, past_key, past_value, cos, sin, key_scale, value_scale,
    new_head, cache_head, rows, first_token, token_end, past, new,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to all keys that the rows of a block see: the cached keys of one head, then the new keys.

    ``rows`` [BLOCK_M] belong to the new tokens ``first_token ... token_end - 1``. ``new_head`` and ``cache_head`` are the
    head's offsets, in elements, in ``key`` and ``value`` and in the cache.

    Returns:
        Sum of weights [BLOCK_M] and weighted sum of values [BLOCK_M, HEAD_DIM], float32.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    KV_ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    CACHE: tl.constexpr = past_key.dtype.element_ty
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)

    # A block with padding only reads no keys.
    cached = tl.where(first_token < new, past, 0)
    whole = cached // BLOCK_N * BLOCK_N
    top, total, acc = attend_to_cache(
        q_turning, q_passing, past_key + cache_head, past_value + cache_head, 0, whole, cached,
        top, total, acc, BLOCK_N, HALF, SCALE, STAGES, False,
    )  # fmt: skip
    top, total, acc = attend_to_cache(
        q_turning, q_passing, past_key + cache_head, past_value + cache_head, whole, cached, cached,
        top, total, acc, BLOCK_N, HALF, SCALE, 1, True,
    )  # fmt: skip

    # First the tiles of new tokens that all rows see, then the tiles on the diagonal, which need a mask.
    whole = tl.where(first_token < new, (first_token + 1) // BLOCK_N * BLOCK_N, 0)
    top, total, acc = attend_to_new(
        q_turning, q_passing, key + new_head, value + new_head, cos, sin, key_scale, value_scale,
        0, whole, rows // GROUP, new, past, top, total, acc, BLOCK_N, HALF, KV_ROW, SCALE, STAGES, False, CACHE,
    )  # fmt: skip
    top, total, acc = attend_to_new(
        q_turning, q_passing, key + new_head, value + new_head, cos, sin, key_scale, value_scale,
        whole, token_end, rows // GROUP, new, past, top, total, acc, BLOCK_N, HALF, KV_ROW, SCALE, 1, True, CACHE,
    )  # fmt: skip
    return total, acc


@triton.jit
def append_rows(
    key, value, cos, sin, key_scale, value_scale, present_key, present_value, first_row, past, new,
    BLOCK_M: tl.constexpr, APPEND_N: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, KV_ROW: tl.constexpr,
):  # fmt: skip
    """Append to the cache the new tokens of one head whose first row is among the BLOCK_M rows from ``first_row`` on."""
    tokens = tl.cdiv(first_row, GROUP) + tl.arange(0, APPEND_N)
    owned = (tokens * GROUP < first_row + BLOCK_M) & (tokens < new)
    turning, passing, v = new_tokens(
        key, value, cos, sin, key_scale, value_scale, tokens, owned, past,
        APPEND_N, HALF, KV_ROW, True, present_key.dtype.element_ty,
    )  # fmt: skip
    append(present_key, present_value, turning, passing, v, past + tokens, owned, HALF)


@triton.jit
def extend_piece(
    query, key, value, past_key, past_value, cos, sin, key_scale, value_scale, present_key, present_value,
    first_row, first_tile, tiles, own, past, new,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, APPEND_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to tiles ``first_tile ... first_tile + tiles - 1`` of one head, which has ``own`` tiles.

    A tile is BLOCK_N keys: first the tiles of cached keys, then the tiles of new keys. The block with the last tile
    appends the new tokens of its rows.

    Returns:
        Per row: maximum [BLOCK_M] of the scores in base 2, sum of the weights [BLOCK_M], and weighted sum of the
        values [BLOCK_M, HEAD_DIM], all float32.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    KV_ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    CACHE: tl.constexpr = past_key.dtype.element_ty
    rows = first_row + tl.arange(0, BLOCK_M)
    q_turning, q_passing = queries(
        query, cos, sin, key_scale, rows, past, new, BLOCK_M, HALF, GROUP, GROUP * KV_ROW
    )
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    last_tile = first_tile + tiles
    last_key = tl.minimum(last_tile * BLOCK_N, past)
    top, total, acc = attend_to_cache(
        q_turning, q_passing, past_key, past_value, first_tile * BLOCK_N, last_key, last_key,
        top, total, acc, BLOCK_N, HALF, SCALE, STAGES, True,
    )  # fmt: skip
    cached = tl.cdiv(past, BLOCK_N)
    last_token = tl.minimum((last_tile - cached) * BLOCK_N, new)
    top, total, acc = attend_to_new(
        q_turning, q_passing, key, value, cos, sin, key_scale, value_scale,
        tl.maximum(first_tile - cached, 0) * BLOCK_N, last_token, rows // GROUP, new, past, top, total, acc,
        BLOCK_N, HALF, KV_ROW, SCALE, 1, True, CACHE,
    )  # fmt: skip
    if last_tile == own:
        append_rows(
            key, value, cos, sin, key_scale, value_scale, present_key, present_value, first_row, past, new,
            BLOCK_M, APPEND_N, GROUP, HALF, KV_ROW,
        )  # fmt: skip
    return top, total, acc
