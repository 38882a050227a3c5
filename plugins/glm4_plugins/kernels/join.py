"""Joins the pieces of a head that several blocks computed. The block that counts last does the work."""

import triton
import triton.language as tl

from glm4_plugins.kernels.steps import LOWEST


@triton.jit
def join_pieces(
    partials, counters, programs, first, last, live, top, total, acc,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Store this block's piece. The block that counts last in a group joins the group's pieces, in order of blocks.

    Each of the blocks ``first ... last`` has one piece, of which the first ``live`` rows are used. No block waits for
    another block. A counter tells whether all blocks of a group have stored their pieces, so no block reads a piece
    too early. Two levels of groups are enough for any number of blocks.

    Returns:
        Whether this block has joined all pieces, and the joined maximum [ROWS], sum [ROWS] and output
        [ROWS, HEAD_DIM], float32.
    """
    count, rank = last - first + 1, tl.program_id(0) - first
    # Groups of 8, 16 or 32 pieces: powers of two need no division. Few pieces are one group, joined at once.
    shift = tl.where(count <= 256, 4, 5) - ((count > 16) & (count <= 64)).to(tl.int32)
    groups = (count + (1 << shift) - 1) >> shift
    leader, stride, level = rank, 1, 0  # this block's result covers ``stride`` pieces from ``leader`` on
    group = rank >> shift << shift
    members = tl.minimum(count - group, 1 << shift)
    finished = count == 1
    going = count > 1
    while going:
        tl.debug_barrier()  # all threads have read before any thread stores
        store_piece(partials, programs, first + leader, first, live, top, total, acc, ROWS, HEAD_DIM)
        tl.debug_barrier()  # all threads have stored before any thread counts
        counter = counters + level * (2 * programs) + slot_of(first + group, first)
        going = tl.atomic_add(counter, 1) == members - 1
        if going:
            tl.store(counter, 0)  # the next launch expects zero
            top, total, acc = joined(
                partials, programs, first, first + group, stride, members, live, ROWS, HEAD_DIM, AT_ONCE
            )
            finished = (level > 0) | (groups == 1)
            going = not finished
            leader, group, stride, members, level = group, 0, 1 << shift, groups, level + 1
    return finished, top, total, acc


@triton.jit
def slot_of(block, first):
    """The slot, int64, in which a block stores its piece of a head whose first piece is in block ``first``.

    A block has at most two pieces that need joining. One is of a head that an earlier block began, the other of a head
    that a later block ends.
    """
    return (2 * block + (block == first).to(tl.int32)).to(tl.int64)


@triton.jit
def store_piece(
    partials, programs, block, first, live, top, total, acc, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Store a piece in ``partials``, float32: its normalised output [ROWS, HEAD_DIM], and log2 of its sum of weights
    [ROWS]."""
    rows, channels = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    slot, mask = slot_of(block, first), rows < live
    seen = tl.where(total > 0.0, total, 1.0)
    alone = acc * (1.0 / seen)[:, None]
    weights = partials + programs.to(tl.int64) * (2 * ROWS * HEAD_DIM)
    tl.store(
        partials + (slot * ROWS + rows)[:, None] * HEAD_DIM + channels[None, :], alone, mask=mask[:, None]
    )
    tl.store(weights + slot * ROWS + rows, tl.where(total > 0.0, top + tl.log2(seen), LOWEST), mask=mask)


@triton.jit
def joined(
    partials, programs, first, start, stride, members, live,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Join ``members`` pieces, of every ``stride``-th block from ``start`` on, in this order.

    Returns:
        Maximum [ROWS] in base 2, sum of weights [ROWS] and weighted output [ROWS, HEAD_DIM], float32.
    """
    rows, channels = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    weights = partials + programs.to(tl.int64) * (2 * ROWS * HEAD_DIM)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for member in tl.range(0, members, AT_ONCE):
        pieces, logs = (), ()
        highest = top
        for i in tl.static_range(AT_ONCE):
            there = rows < tl.where(member + i < members, live, 0)
            slot = slot_of(start + (member + i) * stride, first)
            # .cg bypasses the first-level cache, because another SM wrote these values.
            log = tl.load(weights + slot * ROWS + rows, mask=there, other=LOWEST, cache_modifier=".cg")
            piece = tl.load(
                partials + (slot * ROWS + rows)[:, None] * HEAD_DIM + channels[None, :],
                mask=there[:, None], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            pieces, logs = pieces + (piece,), logs + (log,)  # type: ignore[assignment]
            highest = tl.maximum(highest, log)
        decay = tl.exp2(top - highest)
        acc, total, top = acc * decay[:, None], total * decay, highest
        for i in tl.static_range(AT_ONCE):
            gain = tl.exp2(logs[i] - highest)
            acc += pieces[i] * gain[:, None]
            total += gain
    return top, total, acc
