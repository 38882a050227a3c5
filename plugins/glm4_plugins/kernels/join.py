"""Pieces of a head, computed by several blocks, become one: whoever counts last joins them."""

import triton
import triton.language as tl

from glm4_plugins.kernels.steps import LOWEST


@triton.jit
def join_pieces(
    partials, counters, programs, first, last, live, top, total, acc,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Store this block's piece; the block that counts last in a group joins the group's pieces, in their order.

    The blocks ``first ... last`` have a piece each, of which ``live`` rows count. No block waits for another, and none reads what may still
    change: a counter tells whether all of a group have stored. Two levels are enough for any number of blocks.

    Returns whether this block has the whole, and then the whole: maximum, sum and output.
    """
    count, rank = last - first + 1, tl.program_id(0) - first
    # Groups of 8, 16 or 32, a power of two so that nothing is divided; of few pieces one group, joined at once.
    shift = tl.where(count <= 256, 4, 5) - ((count > 16) & (count <= 64)).to(tl.int32)
    groups = (count + (1 << shift) - 1) >> shift
    leader, stride, level = rank, 1, 0  # the block speaks for ``stride`` pieces from ``leader`` on
    group = rank >> shift << shift
    members = tl.minimum(count - group, 1 << shift)
    finished = count == 1
    going = count > 1
    while going:
        tl.debug_barrier()  # every thread has read before one of them stores there
        store_piece(partials, programs, first + leader, first, live, top, total, acc, ROWS, HEAD_DIM)
        tl.debug_barrier()  # every thread has stored before one of them counts
        counter = counters + level * (2 * programs) + slot_of(first + group, first)
        going = tl.atomic_add(counter, 1) == members - 1
        if going:
            tl.store(counter, 0)  # as the next launch expects it
            top, total, acc = joined(
                partials, programs, first, first + group, stride, members, live, ROWS, HEAD_DIM, AT_ONCE
            )
            finished = (level > 0) | (groups == 1)
            going = not finished
            leader, group, stride, members, level = group, 0, 1 << shift, groups, level + 1
    return finished, top, total, acc


@triton.jit
def slot_of(block, first):
    """Where a block stores its piece of a head that begins in block ``first``.

    A block has at most two pieces that are not whole: one that another began, and one that another ends.
    """
    return (2 * block + (block == first).to(tl.int32)).to(tl.int64)


@triton.jit
def store_piece(
    partials, programs, block, first, live, top, total, acc, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Outputs as they would be alone [ROWS, HEAD_DIM], and base-2 logarithms of the sums of weights [ROWS]."""
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
    """The pieces of every ``stride``-th block from ``start`` on, ``members`` of them, joined in this order."""
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
            # .cg: another SM wrote these, so the first-level cache is no place to look.
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
