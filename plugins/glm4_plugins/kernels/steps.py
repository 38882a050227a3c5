"""Steps that prefill and decode share: loading and rotating tokens, and one step of the online softmax."""

import triton
import triton.language as tl

# Lower than every score, but finite: a row that has seen no key yet must not compute -inf - -inf.
LOWEST = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
# 1.5 * 2^23. Adding and subtracting this constant rounds a small number to the nearest integer, ties to even.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def clamped(past, new, sequence, capacity):
    """Numbers of cached and new tokens, limited so that every access stays inside the cache.

    TensorRT times kernels on invented inputs, so any lengths may arrive.
    """
    past = tl.minimum(tl.maximum(past, 0), capacity)
    return past, tl.minimum(tl.maximum(new, 0), tl.minimum(sequence, capacity - past))


@triton.jit
def load_rows(rows, mask, FIRST: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Elements ``FIRST ... FIRST + SIZE - 1`` of each row, [..., SIZE].

    ``rows`` [...] are pointers to the rows' first elements. With MASKED, rows outside ``mask`` [...] are zeros.
    """
    pointers = tl.expand_dims(rows, -1) + (FIRST + tl.arange(0, SIZE))
    if MASKED:
        # Rows that were never written may contain NaN, and zero times NaN is NaN.
        return tl.load(pointers, mask=tl.expand_dims(mask, -1), other=0.0)
    return tl.load(pointers)


@triton.jit
def rotate(x, cos, sin, positions, mask, N: tl.constexpr, HALF: tl.constexpr):
    """RoPE on the pairs (2i, 2i + 1) of ``x`` [N, HALF] at ``positions`` [N]. Returns float32 [N, HALF].

    The two numbers of a pair are neighbours in memory, so no data moves between threads.
    """
    offsets = positions[:, None] * (HALF // 2) + tl.arange(0, HALF // 2)[None, :]
    c = tl.load(cos + offsets, mask=mask[:, None], other=1.0).to(tl.float32)
    s = tl.load(sin + offsets, mask=mask[:, None], other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (N, HALF // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (N, HALF))


@triton.jit
def quantized(x, scale, CACHE: tl.constexpr):
    """``x`` [N, channels] / ``scale`` [channels], rounded and saturated to the type CACHE. Returns float32."""
    x = x.to(tl.float32) / scale[None, :]
    if CACHE == tl.int8:
        x = tl.minimum(tl.maximum(x, -127.0), 127.0)
        return (x + ROUND) - ROUND
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(CACHE).to(tl.float32)


@triton.jit
def new_tokens(
    key, value, cos, sin, key_scale, value_scale, tokens, mask, past,
    N: tl.constexpr, HALF: tl.constexpr, ROW: tl.constexpr, MASKED: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Keys and values of the new ``tokens`` [N] of one head, rounded as the cache stores them, in the inputs' type.

    ``key`` and ``value`` point to the head's first new token. The scales point to the head's scales, or are None.

    Returns:
        Turning half of the keys after RoPE [N, HALF], passing half [N, HALF], and values [N, HEAD_DIM].
    """
    keys, values = key + tokens * ROW, value + tokens * ROW
    turning = load_rows(keys, mask, 0, HALF, MASKED)
    passing = load_rows(keys, mask, HALF, HALF, MASKED)
    v = load_rows(values, mask, 0, 2 * HALF, MASKED)
    rotated = rotate(turning, cos, sin, past + tokens, mask, N, HALF).to(turning.dtype)
    if key_scale is not None:
        channels = tl.arange(0, HALF)
        rotated = quantized(rotated, tl.load(key_scale + channels), CACHE).to(v.dtype)
        passing = quantized(passing, tl.load(key_scale + HALF + channels), CACHE).to(v.dtype)
        v = quantized(v, tl.load(value_scale + tl.arange(0, 2 * HALF)), CACHE).to(v.dtype)
    return rotated, passing, v


@triton.jit
def append(present_key, present_value, rotated, passing, v, positions, mask, HALF: tl.constexpr):
    """Store keys (``rotated``, ``passing`` [N, HALF]) and values [N, HEAD_DIM] at ``positions`` [N] of a head's cache."""
    rows = positions[:, None] * (2 * HALF)
    channels = tl.arange(0, HALF)[None, :]
    cached = present_key.dtype.element_ty
    tl.store(present_key + rows + channels, rotated.to(cached), mask=mask[:, None])
    tl.store(present_key + rows + HALF + channels, passing.to(cached), mask=mask[:, None])
    tl.store(present_value + rows + tl.arange(0, 2 * HALF)[None, :], v.to(cached), mask=mask[:, None])


@triton.jit
def queries(
    query, cos, sin, key_scale, rows, past, new,
    M: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Queries of ``rows`` [M]: the turning half after RoPE and the passing half, [M, HALF] each, in the input's type.

    ``query`` points to the first head of the group in one sequence. With ``key_scale``, queries are multiplied by it.
    """
    tokens = rows // GROUP
    mask = tokens < new
    pointers = query + tokens * ROW + (rows % GROUP) * (2 * HALF)
    turning = load_rows(pointers, mask, 0, HALF, True)
    passing = load_rows(pointers, mask, HALF, HALF, True)
    rotated = rotate(turning, cos, sin, past + tokens, mask, M, HALF)
    if key_scale is not None:
        channels = tl.arange(0, HALF)
        rotated = rotated * tl.load(key_scale + channels)[None, :]
        passing = passing.to(tl.float32) * tl.load(key_scale + HALF + channels)[None, :]
    return rotated.to(turning.dtype), passing.to(turning.dtype)


@triton.jit
def attend(q_turning, q_passing, k_turning, k_passing, v, visible, top, total, acc, SCALE: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867) over N keys.

    Queries [..., M, HALF], keys [..., N, HALF], values [..., N, 2 * HALF]; ``visible`` bool [..., M, N], or None if all
    keys are visible. A leading dimension is for independent parts of the keys.

    Returns:
        Updated, in float32: the maximum ``top`` [..., M] in base 2, the sum of weights ``total`` [..., M], and the
        weighted sum of values ``acc`` [..., M, 2 * HALF].
    """
    # The passing half is multiplied first, so that the tensor cores work while the turning half is rotated.
    scores = tl.dot(q_passing, tl.trans(k_passing))
    scores = tl.dot(q_turning, tl.trans(k_turning), scores)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, -1) * (SCALE * LOG2_E))
    weights = tl.exp2(scores * (SCALE * LOG2_E) - tl.expand_dims(new_top, -1))
    decay = tl.exp2(top - new_top)
    acc = tl.dot(weights.to(v.dtype), v, acc * tl.expand_dims(decay, -1))
    return new_top, total * decay + tl.sum(weights, -1), acc


@triton.jit
def attend_to_cache(
    q_turning, q_passing, past_key, past_value, start, stop, past, top, total, acc,
    N: tl.constexpr, HALF: tl.constexpr, SCALE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to the cached keys ``start ... stop - 1`` of one head, N at a time. Returns as :func:`attend`.

    With MASKED, keys from ``past`` on are not visible.
    """
    for first in tl.range(start, stop, N, num_stages=STAGES):
        keys = first + tl.arange(0, N)
        mask = keys < past
        rows = keys * (2 * HALF)
        k_turning = load_rows(past_key + rows, mask, 0, HALF, MASKED).to(q_turning.dtype)
        k_passing = load_rows(past_key + rows, mask, HALF, HALF, MASKED).to(q_turning.dtype)
        v = load_rows(past_value + rows, mask, 0, 2 * HALF, MASKED).to(q_turning.dtype)
        if MASKED:
            visible = mask[None, :]
        else:
            visible = None
        top, total, acc = attend(
            q_turning, q_passing, k_turning, k_passing, v, visible, top, total, acc, SCALE
        )
    return top, total, acc


@triton.jit
def attend_to_new(
    q_turning, q_passing, key, value, cos, sin, key_scale, value_scale,
    start, stop, row_tokens, new, past, top, total, acc,
    N: tl.constexpr, HALF: tl.constexpr, ROW: tl.constexpr, SCALE: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Attend to the new tokens ``start ... stop - 1`` of one head, N at a time. Returns as :func:`attend`.

    With MASKED, a row sees the tokens up to its own, ``row_tokens`` [M].
    """
    for first in tl.range(start, stop, N, num_stages=STAGES):
        tokens = first + tl.arange(0, N)
        k_turning, k_passing, v = new_tokens(
            key, value, cos, sin, key_scale, value_scale, tokens, tokens < new, past,
            N, HALF, ROW, MASKED, CACHE,
        )  # fmt: skip
        if MASKED:
            visible = tokens[None, :] <= row_tokens[:, None]
        else:
            visible = None
        top, total, acc = attend(
            q_turning, q_passing, k_turning, k_passing, v, visible, top, total, acc, SCALE
        )
    return top, total, acc


@triton.jit
def write_output(
    attn_output, value_scale, rows, new, sequence, total, acc,
    HALF: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Divide ``acc`` [M, HEAD_DIM] by ``total`` [M], and store the rows in ``attn_output``. Rows of padding are zeros.

    Without the zeros, later operators could read NaN from padding.
    """
    tokens = rows // GROUP
    channels = tl.arange(0, 2 * HALF)
    output = acc * (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    if value_scale is not None:
        output = output * tl.load(value_scale + channels)[None, :]
    output = tl.where((tokens < new)[:, None], output, 0.0)
    pointers = attn_output + (tokens * ROW + (rows % GROUP) * (2 * HALF))[:, None] + channels[None, :]
    tl.store(pointers, output.to(attn_output.dtype.element_ty), mask=(tokens < sequence)[:, None])
