"""Divides the keys of all sequences evenly among the blocks. A block may begin or end inside a sequence."""

import triton
import triton.language as tl

from glm4_plugins.kernels.decode import decode_piece, touch
from glm4_plugins.kernels.join import join_pieces
from glm4_plugins.kernels.prefill import extend_piece
from glm4_plugins.kernels.steps import clamped, write_output


@triton.jit
def split(
    query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths, counters,
    key_scale, value_scale, batch, sequence, capacity, attn_output, present_key, present_value, partials,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    MAX_BATCH: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, MIN_TILES: tl.constexpr,
    DECODING: tl.constexpr, APPEND_N: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Attention with keys shared among blocks. Arguments as of the kernel's entry.

    Each kv head of a sequence has one item of work for each ROWS rows. Each item consists of tiles of N keys. All tiles
    are numbered in order of items, and each block takes a range of equal length.
    With DECODING, one item has all rows of a head, and its last tile includes the new tokens. Otherwise the new tokens
    have tiles of their own.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    KV_ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    program, programs = tl.program_id(0), tl.num_programs(0)
    sequences, live, pasts, news, tiles, weights, ends = counted(
        past_lengths, query_lengths, batch, sequence, capacity, GROUP, KV_HEADS, MAX_BATCH, ROWS, N, DECODING
    )
    all_tiles = tl.sum(weights, 0)
    share = tl.maximum(tl.cdiv(all_tiles, programs), MIN_TILES)
    start = program * share
    stop = tl.minimum(start + share, all_tiles)
    if DECODING:
        if start < stop:
            b, h, _, past, new, _, item_start = item_at(
                start, sequences, live, pasts, news, tiles, weights, ends, GROUP, ROWS, KV_HEADS, DECODING
            )
            cache_head = (b * KV_HEADS + h).to(tl.int64) * capacity * HEAD_DIM
            first_key = (start - item_start) * N
            last_key = tl.minimum(first_key + share * N, past)
            touch(past_key + cache_head, first_key, last_key, N, HEAD_DIM)
            touch(past_value + cache_head, first_key, last_key, N, HEAD_DIM)

    while start < stop:
        b, h, first_row, past, new, own, item_start = item_at(
            start, sequences, live, pasts, news, tiles, weights, ends, GROUP, ROWS, KV_HEADS, DECODING
        )
        item_stop = item_start + own
        piece_stop = tl.minimum(stop, item_stop)
        # A cache can hold more elements than 32 bits count; one head of it cannot.
        cache_head = (b * KV_HEADS + h).to(tl.int64) * capacity * HEAD_DIM
        new_head = b.to(tl.int64) * sequence * KV_ROW + h * HEAD_DIM
        query_head = (b.to(tl.int64) * sequence * KV_HEADS + h) * GROUP * HEAD_DIM
        k_scale, v_scale = key_scale, value_scale
        if key_scale is not None:
            k_scale = key_scale + h * HEAD_DIM
            v_scale = value_scale + h * HEAD_DIM
        if DECODING:
            top, total, acc = decode_piece(
                query + query_head, key + new_head, value + new_head, past_key + cache_head,
                past_value + cache_head, cos, sin, k_scale, v_scale, present_key + cache_head,
                present_value + cache_head, start - item_start, piece_stop - start, own, past, new,
                GROUP, KV_HEADS, HEAD_DIM, SCALE, ROWS, N, STAGES,
            )  # fmt: skip
        else:
            top, total, acc = extend_piece(
                query + query_head, key + new_head, value + new_head, past_key + cache_head,
                past_value + cache_head, cos, sin, k_scale, v_scale, present_key + cache_head,
                present_value + cache_head, first_row, start - item_start, piece_stop - start, own, past, new,
                GROUP, KV_HEADS, HEAD_DIM, SCALE, ROWS, N, APPEND_N, STAGES,
            )  # fmt: skip
        finished, top, total, acc = join_pieces(
            partials, counters, programs, item_start // share, (item_stop - 1) // share,
            new * GROUP - first_row, top, total, acc, ROWS, HEAD_DIM, AT_ONCE,
        )  # fmt: skip
        if finished:
            write_output(
                attn_output + query_head, v_scale, first_row + tl.arange(0, ROWS), new, sequence, total, acc,
                HALF, GROUP, GROUP * KV_ROW,
            )  # fmt: skip
            if not DECODING:
                write_padding(
                    attn_output + query_head, v_scale, first_row + ROWS, new, sequence, total, acc,
                    HALF, GROUP, GROUP * KV_ROW, ROWS,
                )  # fmt: skip
        start = piece_stop


@triton.jit
def counted(
    past_lengths, query_lengths, batch, sequence, capacity,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, MAX_BATCH: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    DECODING: tl.constexpr,
):  # fmt: skip
    """Count the tiles of every sequence.

    Returns:
        int32 arrays [MAX_BATCH] by sequence: its number, whether the batch has it (bool), cached tokens, new tokens,
        tiles of one item, tiles of all items, and number of the first tile after the sequence.
    """
    # Every block counts all tiles, so all blocks agree on the ranges.
    sequences = tl.arange(0, MAX_BATCH)
    live = sequences < batch
    pasts, news = clamped(
        tl.load(past_lengths + sequences, mask=live, other=0),
        tl.load(query_lengths + sequences, mask=live, other=0), sequence, capacity,
    )  # fmt: skip
    pasts = tl.where(news > 0, pasts, 0)  # a sequence of padding attends to no key
    tiles = tl.maximum(tl.cdiv(pasts, N), 1)
    items = tl.full((MAX_BATCH,), KV_HEADS, tl.int32)
    if not DECODING:
        tiles = tl.maximum(tl.cdiv(pasts, N) + tl.cdiv(news, N), 1)
        items = KV_HEADS * tl.maximum(tl.cdiv(news * GROUP, ROWS), 1)
    weights = tl.where(live, tiles * items, 0)
    ends = tl.cumsum(weights, 0)
    return sequences, live, pasts, news, tiles, weights, ends


@triton.jit
def write_padding(
    attn_output, value_scale, end_row, new, sequence, total, acc,
    HALF: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write zeros into the padding rows of a head from ``end_row`` on, if the item that ends there has the last rows.

    Padding rows have no item of their own.
    """
    if end_row >= new * GROUP:
        for padding in tl.range(end_row, sequence * GROUP, ROWS):
            write_output(
                attn_output, value_scale, padding + tl.arange(0, ROWS), 0, sequence,
                total, acc, HALF, GROUP, ROW,
            )  # fmt: skip


@triton.jit
def item_at(
    tile, sequences, live, pasts, news, tiles, weights, ends,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KV_HEADS: tl.constexpr, DECODING: tl.constexpr,
):  # fmt: skip
    """The item that contains ``tile``.

    Returns:
        int32 numbers: sequence, kv head, first row, cached tokens, new tokens, number of tiles, and number of the first
        tile.
    """
    b = tl.sum((live & (ends <= tile)).to(tl.int32), 0)
    mine = sequences == b
    past, new = tl.sum(tl.where(mine, pasts, 0), 0), tl.sum(tl.where(mine, news, 0), 0)
    own = tl.sum(tl.where(mine, tiles, 0), 0)
    before = tl.sum(tl.where(mine, ends - weights, 0), 0)
    if DECODING:
        item = 0
        for i in tl.static_range(1, KV_HEADS):  # faster than a division
            item += (tile - before >= i * own).to(tl.int32)
        return b, item, 0, past, new, own, before + item * own
    item = (tile - before) // own
    of_head = tl.maximum(tl.cdiv(new * GROUP, ROWS), 1)
    return b, item // of_head, (item % of_head) * ROWS, past, new, own, before + item * own
