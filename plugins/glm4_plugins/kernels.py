"""``glm4::PartialRopeGqaAttention`` as one Triton kernel: RoPE, cache append and causal GQA attention in one launch.

The query heads of one key-value head and the new tokens are packed into rows, row = token * GROUP + head, so
that one read of the cache serves all of them. A branch on the sequence length, the same in every block, picks:

prefill  a block owns BLOCK_M rows and walks over the keys before them: the cache, then the new tokens.
decode   all rows fit one block. The keys of all sequences are laid end to end in tiles, and every block takes
         an equal share of the tiles, wherever it begins; pieces of a sequence are joined by its last block.

Blocks of one launch run in any order, so none reads a cache row that another appends: the keys of new tokens
are rotated again from ``key`` by each block that needs them. ``past_key`` and ``present_key`` are one buffer,
as are ``past_value`` and ``present_value``.

RoPE turns the first half of each head (GLM-4's ``partial_rotary_factor`` is 0.5), so queries and keys are held
as two halves, and only the first goes through registers. Scores, softmax and sums are float32.

An int8 cache has a scale per (kv head, channel). The keys' scales are folded into the query and the values'
into the output, so that the loops only convert integers, which float16 and bfloat16 hold exactly.
"""

import triton
import triton.language as tl

# Below every score, yet finite: a row that has seen no key yet must not compute -inf - -inf.
LOWEST = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_half(rows, mask, HALF: tl.constexpr, WHICH: tl.constexpr, MASKED: tl.constexpr):
    """Half ``WHICH`` of each row; ``rows`` [N] are pointers to the rows' first elements."""
    pointers = rows[:, None] + (WHICH * HALF + tl.arange(0, HALF))[None, :]
    if MASKED:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def _rotate(x, cos, sin, positions, mask, N: tl.constexpr, HALF: tl.constexpr):
    """RoPE on the pairs (2i, 2i + 1) of ``x`` [N, HALF] at ``positions`` [N]; float32.

    Pairs are neighbours in memory, so splitting and joining them moves nothing between threads.
    """
    offsets = positions[:, None] * (HALF // 2) + tl.arange(0, HALF // 2)[None, :]
    c = tl.load(cos + offsets, mask=mask[:, None], other=1.0).to(tl.float32)
    s = tl.load(sin + offsets, mask=mask[:, None], other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (N, HALF // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (N, HALF))


@triton.jit
def _quantized(x, scale):
    """``x`` in steps of ``scale`` [channels], rounded half up to -127 ... 127; still floating point."""
    return tl.minimum(tl.maximum(tl.floor(x.to(tl.float32) / scale[None, :] + 0.5), -127.0), 127.0)


@triton.jit
def _new_tokens(
    key, value, cos, sin, key_scale, value_scale, tokens, mask, past,
    N: tl.constexpr, HALF: tl.constexpr, ROW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys (two halves) and values of new tokens, as the cache will hold them, in the inputs' type.

    ``key`` and ``value`` point to the first new token of one sequence and head; ``key_scale`` and
    ``value_scale`` to that head's scales, or are None.
    """
    keys, values = key + tokens * ROW, value + tokens * ROW
    turning = _load_half(keys, mask, HALF, 0, MASKED)
    passing = _load_half(keys, mask, HALF, 1, MASKED)
    pointers = values[:, None] + tl.arange(0, 2 * HALF)[None, :]
    if MASKED:
        v = tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        v = tl.load(pointers)
    rotated = _rotate(turning, cos, sin, past + tokens, mask, N, HALF).to(turning.dtype)
    if key_scale is not None:
        channels = tl.arange(0, HALF)
        rotated = _quantized(rotated, tl.load(key_scale + channels)).to(v.dtype)
        passing = _quantized(passing, tl.load(key_scale + HALF + channels)).to(v.dtype)
        v = _quantized(v, tl.load(value_scale + tl.arange(0, 2 * HALF))).to(v.dtype)
    return rotated, passing, v


@triton.jit
def _append(present_key, present_value, rotated, passing, v, positions, mask, HALF: tl.constexpr):
    """Store new keys and values of one head at ``positions`` of its cache."""
    rows = positions[:, None] * (2 * HALF)
    channels = tl.arange(0, HALF)[None, :]
    cached = present_key.dtype.element_ty
    tl.store(present_key + rows + channels, rotated.to(cached), mask=mask[:, None])
    tl.store(present_key + rows + HALF + channels, passing.to(cached), mask=mask[:, None])
    tl.store(present_value + rows + tl.arange(0, 2 * HALF)[None, :], v.to(cached), mask=mask[:, None])


@triton.jit
def _queries(
    query, cos, sin, key_scale, rows, past, new, sequence,
    M: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Rotated queries of ``rows`` [M] as two halves; ``query`` points to one sequence's first head of the group."""
    tokens = rows // GROUP
    mask = tokens < tl.minimum(new, sequence)
    pointers = query + tokens * ROW + (rows % GROUP) * (2 * HALF)
    turning = _load_half(pointers, mask, HALF, 0, True)
    passing = _load_half(pointers, mask, HALF, 1, True)
    rotated = _rotate(turning, cos, sin, past + tokens, mask, M, HALF)
    if key_scale is not None:
        channels = tl.arange(0, HALF)
        rotated = rotated * tl.load(key_scale + channels)[None, :]
        passing = passing.to(tl.float32) * tl.load(key_scale + HALF + channels)[None, :]
    return rotated.to(turning.dtype), passing.to(turning.dtype)


@triton.jit
def _attend(q_turning, q_passing, k_turning, k_passing, v, visible, top, total, acc, SCALE: tl.constexpr):
    """One step of the online softmax; ``visible`` [M, N] or None. Returns the running maximum, sum and output."""
    # The half that is multiplied as loaded goes first, so that the tensor cores work while the other turns.
    scores = tl.dot(q_passing, tl.trans(k_passing))
    scores = tl.dot(q_turning, tl.trans(k_turning), scores)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * (SCALE * LOG2_E))
    weights = tl.exp2(scores * (SCALE * LOG2_E) - new_top[:, None])
    decay = tl.exp2(top - new_top)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])
    return new_top, total * decay + tl.sum(weights, 1), acc


@triton.jit
def _attend_to_cache(
    q_turning, q_passing, past_key, past_value, start, stop, past, top, total, acc,
    N: tl.constexpr, HALF: tl.constexpr, SCALE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to the cached keys ``start ... stop - 1`` of one head; with MASKED, to those before ``past`` only."""
    for first in tl.range(start, stop, N, num_stages=STAGES):
        keys = first + tl.arange(0, N)
        mask = keys < past
        rows = keys * (2 * HALF)
        k_turning = _load_half(past_key + rows, mask, HALF, 0, MASKED).to(q_turning.dtype)
        k_passing = _load_half(past_key + rows, mask, HALF, 1, MASKED).to(q_turning.dtype)
        pointers = past_value + rows[:, None] + tl.arange(0, 2 * HALF)[None, :]
        if MASKED:
            # Rows that were never written may hold NaN, which weight zero does not silence.
            v = tl.load(pointers, mask=mask[:, None], other=0.0).to(q_turning.dtype)
            visible = mask[None, :]
        else:
            v = tl.load(pointers).to(q_turning.dtype)
            visible = None
        top, total, acc = _attend(
            q_turning, q_passing, k_turning, k_passing, v, visible, top, total, acc, SCALE
        )
    return top, total, acc


@triton.jit
def _attend_to_new(
    q_turning, q_passing, key, value, cos, sin, key_scale, value_scale,
    start, stop, row_tokens, new, past, top, total, acc,
    N: tl.constexpr, HALF: tl.constexpr, ROW: tl.constexpr, SCALE: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to the new tokens ``start ... stop - 1`` of one head; with MASKED, each row to those up to its own."""
    for first in tl.range(start, stop, N, num_stages=STAGES):
        tokens = first + tl.arange(0, N)
        k_turning, k_passing, v = _new_tokens(
            key, value, cos, sin, key_scale, value_scale, tokens, tokens < new, past, N, HALF, ROW, MASKED
        )
        if MASKED:
            visible = tokens[None, :] <= row_tokens[:, None]
        else:
            visible = None
        top, total, acc = _attend(
            q_turning, q_passing, k_turning, k_passing, v, visible, top, total, acc, SCALE
        )
    return top, total, acc


@triton.jit
def _write_output(
    attn_output, value_scale, rows, new, sequence, total, acc,
    HALF: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Normalise and store ``rows``; those of padding as zeros, lest they carry NaN into what follows."""
    tokens = rows // GROUP
    channels = tl.arange(0, 2 * HALF)
    output = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if value_scale is not None:
        output = output * tl.load(value_scale + channels)[None, :]
    output = tl.where((tokens < new)[:, None], output, 0.0)
    pointers = attn_output + (tokens * ROW + (rows % GROUP) * (2 * HALF))[:, None] + channels[None, :]
    tl.store(pointers, output.to(attn_output.dtype.element_ty), mask=(tokens < sequence)[:, None])


@triton.jit
def _prefill(
    query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths, key_scale, value_scale,
    batch, sequence, capacity, attn_output, present_key, present_value,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, APPEND_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    KV_ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    # The last rows see the most keys: they go first, so that no block starts late with the longest walk.
    items = batch * KV_HEADS
    program = tl.program_id(0)
    block = tl.cdiv(sequence * GROUP, BLOCK_M) - 1 - program // items
    b = (program % items) // KV_HEADS
    h = program % KV_HEADS
    past = tl.load(past_lengths + b)
    new = tl.minimum(tl.load(query_lengths + b), sequence)
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

    # A token is appended by the block that holds the first row of it.
    tokens = tl.cdiv(first_row, GROUP) + tl.arange(0, APPEND_N)
    owned = (tokens * GROUP < first_row + BLOCK_M) & (tokens < new) & (past + tokens < capacity)
    turning, passing, v = _new_tokens(
        key + new_head, value + new_head, cos, sin, key_scale, value_scale, tokens, owned, past,
        APPEND_N, HALF, KV_ROW, True,
    )  # fmt: skip
    _append(
        present_key + cache_head, present_value + cache_head, turning, passing, v, past + tokens, owned, HALF
    )

    rows = first_row + tl.arange(0, BLOCK_M)
    q_turning, q_passing = _queries(
        query + query_head, cos, sin, key_scale, rows, past, new, sequence,
        BLOCK_M, HALF, GROUP, GROUP * KV_ROW,
    )  # fmt: skip
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)

    # A block of padding alone walks over nothing.
    cached = tl.where(first_token < new, past, 0)
    whole = cached // BLOCK_N * BLOCK_N
    top, total, acc = _attend_to_cache(
        q_turning, q_passing, past_key + cache_head, past_value + cache_head, 0, whole, cached,
        top, total, acc, BLOCK_N, HALF, SCALE, STAGES, False,
    )  # fmt: skip
    top, total, acc = _attend_to_cache(
        q_turning, q_passing, past_key + cache_head, past_value + cache_head, whole, cached, cached,
        top, total, acc, BLOCK_N, HALF, SCALE, 1, True,
    )  # fmt: skip

    # Tiles of new tokens that every row sees, then those on the diagonal.
    whole = tl.where(first_token < new, (first_token + 1) // BLOCK_N * BLOCK_N, 0)
    top, total, acc = _attend_to_new(
        q_turning, q_passing, key + new_head, value + new_head, cos, sin, key_scale, value_scale,
        0, whole, rows // GROUP, new, past, top, total, acc, BLOCK_N, HALF, KV_ROW, SCALE, STAGES, False,
    )  # fmt: skip
    top, total, acc = _attend_to_new(
        q_turning, q_passing, key + new_head, value + new_head, cos, sin, key_scale, value_scale,
        whole, token_end, rows // GROUP, new, past, top, total, acc, BLOCK_N, HALF, KV_ROW, SCALE, 1, True,
    )  # fmt: skip
    _write_output(
        attn_output + query_head, value_scale, rows, new, sequence, total, acc, HALF, GROUP, GROUP * KV_ROW
    )


@triton.jit
def _decode(
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
        q_turning, q_passing = _queries(
            query + query_head, cos, sin, k_scale, rows, past, new, sequence,
            ROWS, HALF, GROUP, GROUP * KV_ROW,
        )  # fmt: skip
        top = tl.full((ROWS,), LOWEST, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)

        first_key = (start - item_start) * DECODE_N
        last_key = tl.minimum((piece_stop - item_start) * DECODE_N, past)
        whole = tl.maximum(first_key, last_key // DECODE_N * DECODE_N)
        top, total, acc = _attend_to_cache(
            q_turning, q_passing, past_key + cache_head, past_value + cache_head, first_key, whole, past,
            top, total, acc, DECODE_N, HALF, SCALE, DECODE_STAGES, False,
        )  # fmt: skip
        top, total, acc = _attend_to_cache(
            q_turning, q_passing, past_key + cache_head, past_value + cache_head, whole, last_key, past,
            top, total, acc, DECODE_N, HALF, SCALE, 1, True,
        )  # fmt: skip
        if piece_stop == item_stop:
            tokens = tl.arange(0, NEW_N)
            valid = tokens < new
            turning, passing, v = _new_tokens(
                key + new_head, value + new_head, cos, sin, k_scale, v_scale, tokens, valid, past,
                NEW_N, HALF, KV_ROW, True,
            )  # fmt: skip
            _append(
                present_key + cache_head, present_value + cache_head, turning, passing, v, past + tokens,
                valid & (past + tokens < capacity), HALF,
            )  # fmt: skip
            visible = tokens[None, :] <= (rows // GROUP)[:, None]
            top, total, acc = _attend(
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
            _write_output(
                attn_output + query_head, v_scale, rows, new, sequence, total, acc,
                HALF, GROUP, GROUP * KV_ROW,
            )  # fmt: skip
        start = piece_stop


@triton.jit
def partial_rope_gqa_attention(
    query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths, counters,
    key_scale, value_scale, batch, sequence, capacity,
    attn_output, present_key, present_value, present_counters, partials,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    MAX_BATCH: tl.constexpr, PHASE: tl.constexpr,
    ROWS: tl.constexpr, NEW_N: tl.constexpr, APPEND_N: tl.constexpr, MIN_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    DECODE_N: tl.constexpr, DECODE_STAGES: tl.constexpr,
):  # fmt: skip
    """The entry: inputs, int32 sizes, outputs, in the order in which TensorRT passes them.

    The grid has one dimension; see :func:`glm4_plugins.launch.grid`. ``counters`` [at least batch * KV_HEADS]
    int32 are zero before and after; ``present_counters`` is the same buffer. ``partials`` is scratch.
    """
    decoding = sequence * GROUP <= ROWS if PHASE == 0 else PHASE == 2
    if decoding:
        _decode(
            query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths, counters,
            key_scale, value_scale, batch, sequence, capacity,
            attn_output, present_key, present_value, partials,
            GROUP, KV_HEADS, HEAD_DIM, SCALE, MAX_BATCH, ROWS, NEW_N, DECODE_N, DECODE_STAGES, MIN_TILES,
        )  # fmt: skip
    else:
        _prefill(
            query, key, value, past_key, past_value, cos, sin, past_lengths, query_lengths,
            key_scale, value_scale, batch, sequence, capacity, attn_output, present_key, present_value,
            GROUP, KV_HEADS, HEAD_DIM, SCALE, BLOCK_M, BLOCK_N, APPEND_N, STAGES,
        )  # fmt: skip
