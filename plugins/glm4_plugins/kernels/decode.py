"""Few new tokens: the keys of all sequences are shared evenly among the blocks."""

import triton
import triton.language as tl

from glm4_plugins.kernels.steps import (
    LOWEST,
    append,
    attend,
    attend_to_cache,
    new_tokens,
    queries,
    write_output,
)


@triton.jit
def decode(
    query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths, counters,
    key_scale, value_scale, batch, sequence, capacity, attn_output, present_key, present_value, partials,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    MAX_BATCH: tl.constexpr, ROWS: tl.constexpr, NEW_N: tl.constexpr,
    DECODE_N: tl.constexpr, DECODE_STAGES: tl.constexpr, MIN_TILES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    KV_ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    program, programs = tl.program_id(0), tl.num_programs(0)
    # A sequence has its cached keys in tiles and one tile of new tokens, per head. Everyone counts them alike.
    sequences = tl.arange(0, MAX_BATCH)
    live = sequences < batch
    tiles = tl.where(live, tl.cdiv(tl.load(past_lengths + sequences, mask=live, other=0), DECODE_N) + 1, 0)
    ends = tl.cumsum(tiles, 0) * KV_HEADS
    all_tiles = tl.sum(tiles, 0) * KV_HEADS
    share = tl.maximum(tl.cdiv(all_tiles, programs), MIN_TILES)
    start = program * share
    stop = tl.minimum(start + share, all_tiles)
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, HEAD_DIM)
    statistics = partials + programs.to(tl.int64) * (2 * ROWS * HEAD_DIM)

    while start < stop:
        b = tl.sum((ends <= start).to(tl.int32), 0)
        own = tl.sum(tl.where(sequences == b, tiles, 0), 0)
        before = tl.sum(tl.where(sequences == b, ends, 0), 0) - own * KV_HEADS
        h = (start - before) // own
        item_start = before + h * own
        item_stop = item_start + own
        piece_stop = tl.minimum(stop, item_stop)
        past = tl.load(past_lengths + b)
        new = tl.minimum(tl.load(query_lengths + b), sequence)

        cache_head = (b * KV_HEADS + h).to(tl.int64) * capacity * HEAD_DIM
        new_head = b.to(tl.int64) * sequence * KV_ROW + h * HEAD_DIM
        query_head = (b.to(tl.int64) * sequence * KV_HEADS + h) * GROUP * HEAD_DIM
        k_scale, v_scale = key_scale, value_scale
        if key_scale is not None:
            k_scale = key_scale + h * HEAD_DIM
            v_scale = value_scale + h * HEAD_DIM
        q_turning, q_passing = queries(
            query + query_head, cos, sin, k_scale, rows, past, new, sequence,
            ROWS, HALF, GROUP, GROUP * KV_ROW,
        )  # fmt: skip
        top = tl.full((ROWS,), LOWEST, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)

        first_key = (start - item_start) * DECODE_N
        last_key = tl.minimum((piece_stop - item_start) * DECODE_N, past)
        whole = tl.maximum(first_key, last_key // DECODE_N * DECODE_N)
        top, total, acc = attend_to_cache(
            q_turning, q_passing, past_key + cache_head, past_value + cache_head, first_key, whole, past,
            top, total, acc, DECODE_N, HALF, SCALE, DECODE_STAGES, False,
        )  # fmt: skip
        top, total, acc = attend_to_cache(
            q_turning, q_passing, past_key + cache_head, past_value + cache_head, whole, last_key, past,
            top, total, acc, DECODE_N, HALF, SCALE, 1, True,
        )  # fmt: skip
        if piece_stop == item_stop:
            tokens = tl.arange(0, NEW_N)
            valid = tokens < new
            turning, passing, v = new_tokens(
                key + new_head, value + new_head, cos, sin, k_scale, v_scale, tokens, valid, past,
                NEW_N, HALF, KV_ROW, True,
            )  # fmt: skip
            append(
                present_key + cache_head, present_value + cache_head, turning, passing, v, past + tokens,
                valid & (past + tokens < capacity), HALF,
            )  # fmt: skip
            visible = tokens[None, :] <= (rows // GROUP)[:, None]
            top, total, acc = attend(
                q_turning, q_passing, turning, passing, v, visible, top, total, acc, SCALE
            )

        # The blocks first ... last have a piece of this head. A block has at most two pieces that are not whole:
        # one that another began (slot 0), and one that another ends (slot 1).
        first, last = item_start // share, (item_stop - 1) // share
        finished = first == last
        if not finished:
            slot = (2 * program + (program == first).to(tl.int32)).to(tl.int64)
            tl.store(partials + (slot * ROWS + rows)[:, None] * HEAD_DIM + channels[None, :], acc)
            tl.store(statistics + slot * (2 * ROWS) + rows, top)
            tl.store(statistics + slot * (2 * ROWS) + ROWS + rows, total)
            tl.debug_barrier()  # every thread has stored before one of them counts
            finished = tl.atomic_add(counters + b * KV_HEADS + h, 1) == last - first
            if finished:
                top = tl.full((ROWS,), LOWEST, tl.float32)
                total = tl.zeros((ROWS,), tl.float32)
                acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
                for other in tl.range(first, last + 1, loop_unroll_factor=4):
                    slot = (2 * other + (other == first).to(tl.int32)).to(tl.int64)
                    # .cg: another SM wrote these, so the first-level cache is no place to look.
                    piece = tl.load(
                        partials + (slot * ROWS + rows)[:, None] * HEAD_DIM + channels[None, :],
                        cache_modifier=".cg",
                    )
                    its_top = tl.load(statistics + slot * (2 * ROWS) + rows, cache_modifier=".cg")
                    its_total = tl.load(statistics + slot * (2 * ROWS) + ROWS + rows, cache_modifier=".cg")
                    new_top = tl.maximum(top, its_top)
                    decay, gain = tl.exp2(top - new_top), tl.exp2(its_top - new_top)
                    acc = acc * decay[:, None] + piece * gain[:, None]
                    total = total * decay + its_total * gain
                    top = new_top
                tl.store(counters + b * KV_HEADS + h, 0)  # as the next launch expects it
        if finished:
            write_output(
                attn_output + query_head, v_scale, rows, new, sequence, total, acc,
                HALF, GROUP, GROUP * KV_ROW,
            )  # fmt: skip
        start = piece_stop
