"""Decode: all rows fit one matrix product, and blocks share the keys of a sequence."""

import triton
import triton.language as tl

from glm4_plugins.kernels.steps import LOG2_E, LOWEST, append, attend_to_cache, new_tokens, queries


@triton.jit
def decode_piece(
    query, key, value, past_key, past_value, cos, sin, key_scale, value_scale, present_key, present_value,
    first_tile, tiles, own, past, new,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, DECODE_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to tiles ``first_tile ... first_tile + tiles - 1`` of one head, which has ``own`` tiles.

    A tile is DECODE_N cached keys. The new tokens belong to the last tile.

    Returns:
        Per row: maximum [ROWS] of the scores in base 2, sum of the weights [ROWS], and weighted sum of the values
        [ROWS, HEAD_DIM], all float32.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    KV_ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    rows = tl.arange(0, ROWS)
    q_turning, q_passing = queries(
        query, cos, sin, key_scale, rows, past, new, ROWS, HALF, GROUP, GROUP * KV_ROW
    )
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    if first_tile + tiles == own:
        top, total, acc = attend_one_by_one(
            q_turning, q_passing, key, value, cos, sin, key_scale, value_scale, present_key, present_value,
            rows // GROUP, past, new, top, total, acc, HALF, KV_ROW, SCALE,
        )  # fmt: skip
    stop = tl.minimum((first_tile + tiles) * DECODE_N, past)
    return attend_to_cache(
        q_turning, q_passing, past_key, past_value, first_tile * DECODE_N, stop, stop, top, total, acc,
        DECODE_N, HALF, SCALE, STAGES, True,
    )  # fmt: skip


@triton.jit
def touch(cache, first, stop, N: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load one element of each 32 bytes of the cache rows ``first ... first + N - 1`` before ``stop`` of one head.

    The loads bring the rows into the second-level cache while the block rotates queries. The result is not used.
    """
    STEP: tl.constexpr = 256 // cache.dtype.element_ty.primitive_bitwidth
    keys = first + tl.arange(0, N)
    pointers = cache + (keys * HEAD_DIM)[:, None] + (tl.arange(0, HEAD_DIM // STEP) * STEP)[None, :]
    tl.load(pointers, mask=(keys < stop)[:, None], volatile=True)


@triton.jit
def attend_one_by_one(
    q_turning, q_passing, key, value, cos, sin, key_scale, value_scale, present_key, present_value,
    row_tokens, past, new, top, total, acc,
    HALF: tl.constexpr, KV_ROW: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Attend to the new tokens of one head, one by one, and append each to the cache.

    The released models have one new token here. A model with GROUP = 1 has up to 16.

    Returns:
        The updated ``top`` [M], ``total`` [M] and ``acc`` [M, HEAD_DIM], as :func:`decode_piece` describes them.
    """
    for token in tl.range(0, new):
        tokens = token + tl.arange(0, 1)
        turning, passing, v = new_tokens(
            key, value, cos, sin, key_scale, value_scale, tokens, tokens < new, past,
            1, HALF, KV_ROW, True, present_key.dtype.element_ty,
        )  # fmt: skip
        append(present_key, present_value, turning, passing, v, past + tokens, tokens < new, HALF)
        products = q_turning.to(tl.float32) * turning.to(tl.float32)
        products += q_passing.to(tl.float32) * passing.to(tl.float32)
        scores = tl.where(token <= row_tokens, tl.sum(products, 1) * (SCALE * LOG2_E), float("-inf"))
        new_top = tl.maximum(top, scores)
        weights = tl.exp2(scores - new_top)
        decay = tl.exp2(top - new_top)
        acc = acc * decay[:, None] + weights[:, None] * v.to(tl.float32)
        total = total * decay + weights
        top = new_top
    return top, total, acc
