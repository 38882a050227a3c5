"""The Triton kernel, interpreted on the CPU, against the operator's NumPy meaning in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_cases import interpreter, random_case, rounded, run_kernel, run_operator, run_with_guards

from glm4_plugins.launch import KernelShape, Tiles, blocks_of_items, choices, joins, share
from glm4_plugins.operator import partial_rope_gqa_attention

pytest.importorskip("triton", reason="needs the plugins extra")

# Small blocks, so that short sequences straddle many edges; five blocks share the keys of a decode step.
SMALL = Tiles(32, 16, 1, 16, 1, 16, 1, 4, blocks=5, min_tiles=2)
# As many blocks as make pieces of a head join in one group, in groups of 8, and in groups of 16.
JOINING = {16: (16,), 30: (8, 4), 70: (16, 5)}
TOLERANCE = {"float16": 3e-3, "bfloat16": 2.5e-2}
STEP = {"float16": 2**-10, "bfloat16": 2**-7}  # between neighbouring numbers, relative


@pytest.fixture(scope="module")
def interpreted():
    with interpreter() as call:
        yield call


@pytest.fixture
def run(interpreted):
    """The kernel's results for a case, attributes, block sizes, type and scales."""

    def run(case, attributes, tiles, dtype="float16", phase="shared", order=None, **scales):
        return interpreted(run_kernel, case, attributes, tiles, dtype, scales, phase, order)

    return run


def check(run, case, attributes, lengths, tiles=SMALL, dtype="float16", phase="shared"):
    """One launch, with everything that must not be read set to NaN."""
    case = rounded(case, dtype)
    for b, past in enumerate(case["past_lengths"]):
        for name in ("past_key", "past_value"):
            case[name][b, :, past:] = np.nan
        for name in ("query", "key", "value"):
            case[name][b, lengths[b] :] = np.nan
    output, keys, values, counters, _ = run(case, attributes, tiles, dtype, phase)
    expected = partial_rope_gqa_attention(**case, attributes=attributes)
    for b, new in enumerate(lengths):
        end = case["past_lengths"][b] + new
        np.testing.assert_allclose(output[b, :new], expected[0][b, :new], atol=TOLERANCE[dtype])
        np.testing.assert_array_equal(output[b, new:], 0.0)
        for ours, theirs in zip((keys, values), expected[1:], strict=True):
            np.testing.assert_allclose(ours[b, :, :end], theirs[b, :, :end], rtol=STEP[dtype], atol=1e-5)
            assert np.isnan(ours[b, :, end:]).all()
    assert not counters.any()


# Blocks of 16 keys and of 32 rows: lengths on either side of each edge, and two edges on.
@pytest.mark.parametrize("sequence", [2, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("past", [0, 1, 15, 16, 17, 48])
def test_prefill_at_every_edge(run, sequence, past):
    check(run, *random_case(sequence, 1, sequence, 1, 4, 64, 32, [past], [sequence]), [sequence])


@pytest.mark.parametrize("past", [0, 1, 15, 16, 17, 31, 32, 33, 159, 160, 161, 330])
def test_decode_at_every_edge(run, past):
    check(run, *random_case(past, 1, 1, 2, 8, 64, 32, [past], [1]), [1])


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("pasts", [[3, 200, 0, 64], [16] * 9, [500, 1]])
def test_decode_shares_the_keys_of_uneven_sequences(run, pasts, kv_heads):
    ones = [1] * len(pasts)
    check(run, *random_case(1, len(pasts), 1, kv_heads, 4, 64, 32, pasts, ones), ones)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8, 16, 24])
@pytest.mark.parametrize("sequence", [1, 3, 19])
def test_every_ratio_of_heads(run, group, sequence):
    lengths = [sequence, max(sequence - 2, 1)]
    check(run, *random_case(group, 2, sequence, 2, group, 64, 32, [21, 5], lengths), lengths)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("sequence", "lengths"), [(1, [1, 1]), (20, [20, 13])])
def test_the_released_models_heads(run, dtype, sequence, lengths):
    case, attributes = random_case(2, 2, sequence, 2, 16, 128, 64, [37, 70], lengths)
    check(run, case, attributes, lengths, dtype=dtype)


@pytest.mark.parametrize("sequence", [1, 2, 40])
def test_padding_is_neither_read_nor_written(run, sequence):
    lengths = [sequence // 2, sequence, 0, 1]
    check(run, *random_case(8, 4, sequence, 2, 2, 64, 32, [9, 33, 20, 0], lengths), lengths)


@pytest.mark.parametrize("tiles", choices(90), ids=lambda t: f"{t.block_m}x{t.block_n}")
@pytest.mark.parametrize(
    ("sequence", "past"),
    [(1, 700), (1, 127), (70, 0), (40, 300), pytest.param(150, 0, marks=pytest.mark.more)],
)
def test_the_block_sizes_on_offer(run, tiles, sequence, past):
    check(run, *random_case(9, 1, sequence, 2, 16, 128, 64, [past], [sequence]), [sequence], tiles)


@pytest.mark.parametrize("sequence", [1, 50])
def test_blocks_may_run_in_any_order(run, sequence):
    """The same bits whichever block is first, and whichever joins the pieces."""
    case, attributes = random_case(17, 2, sequence, 2, 4, 64, 32, [150, 33], [sequence] * 2)
    case = rounded(case, "float16")
    in_turn, *shuffled = (run(case, attributes, SMALL, order=order) for order in (None, 1, 2, 3))
    for other in shuffled:
        for ours, theirs in zip(other[:4], in_turn[:4], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("pasts", [[0], [40], [160], [330, 3], [150, 33, 0, 16], [16] * 9])
def test_the_kernel_divides_its_work_as_share_says(run, pasts):
    """Each piece of a head that several blocks work on is one written part of the scratch."""
    ones = [1] * len(pasts)
    case, attributes = random_case(21, len(pasts), 1, 2, 8, 64, 32, pasts, ones)
    partials = run(rounded(case, "float16"), attributes, SMALL)[4]
    shape = KernelShape(16, 2, 64, 1.0, len(pasts), phase="decode")
    spans = blocks_of_items(shape, SMALL, pasts, 1)
    slots = {
        2 * block + (block == first)
        for first, last in spans
        if first < last
        for block in range(first, last + 1)
    }
    written = (~np.isnan(partials[: 10 * 16 * 64].reshape(10, -1))).any(1)
    blocks = max(last for _, last in spans) + 1
    # The kernel counts blocks as launched, of which some may have nothing to do.
    assert set(np.flatnonzero(written)) - {i for i in range(10) if i >= 2 * blocks} == slots
    part = share(shape, SMALL, pasts, 1)
    assert part.merges == (
        (most,) if (most := max(last - first for first, last in spans) + 1) > 1 else ()
    ) or (part.merges[0] >= most)
    assert (part.phase, part.rows) == ("decode", 16)
    assert part.blocks <= SMALL.blocks


@pytest.mark.parametrize("blocks", [16, 30, pytest.param(70, marks=pytest.mark.more)])
@pytest.mark.parametrize("sequence", [1, 5])
def test_pieces_are_joined_in_groups_of_fixed_order(run, blocks, sequence):
    """Right, and the same bits whichever block ends last, on one level and on two."""
    tiles = replace(SMALL, blocks=blocks, min_tiles=1)
    phase = "decode" if sequence == 1 else "extend"
    past = 16 * blocks - 5 if sequence == 1 else 16 * blocks - 37
    shape = KernelShape(4, 1, 64, 1.0, 1, phase=phase)
    first, last = blocks_of_items(shape, tiles, [past], sequence)[0]
    assert joins(last - first + 1) == JOINING[blocks] or sequence > 1
    case, attributes = random_case(22, 1, sequence, 1, 4, 64, 32, [past], [sequence])
    check(run, case, attributes, [sequence], tiles, phase=phase)
    case = rounded(case, "float16")
    one, other = (run(case, attributes, tiles, phase=phase, order=order) for order in (None, 3))
    for ours, theirs in zip(other[:4], one[:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("sequence", "lengths"), [(2, [2, 1]), (33, [33, 17]), (64, [64, 0]), (65, [65, 3])])
def test_few_new_tokens_behind_a_cache(run, sequence, lengths):
    """The branch that shares keys among blocks, and one more than it takes; padding comes out as zeros."""
    check(run, *random_case(23, 2, sequence, 2, 2, 64, 32, [150, 33], lengths), lengths)


GARBAGE = (-(2**31), -5, -1, 0, 1, 23, 24, 25, 26, 1000, 2**31 - 1)


@pytest.mark.parametrize("phase", ["decode", "extend", "prompt"])
@pytest.mark.parametrize("quantity", ["past_lengths", "query_lengths", "both"])
def test_made_up_lengths_touch_nothing_outside(interpreted, phase, quantity):
    """TensorRT times plugins on inputs that it makes up. Guards lie around all that the kernel writes."""
    rng = np.random.default_rng(24)
    sequence = 1 if phase == "decode" else 5
    for _ in range(6):
        case, attributes = random_case(24, 3, sequence, 2, 8, 64, 32, [17, 20, 3], [sequence] * 3, slack=2)
        for name in ("past_lengths", "query_lengths"):
            if quantity in (name, "both"):
                case[name] = rng.choice(GARBAGE, 3).astype(np.int32)
        found = interpreted(run_with_guards, case, attributes, SMALL, "float16", {}, phase)
        for memory in found[:3]:
            assert (memory[[0, 2]] == 7).all(), case
            assert np.isfinite(memory[1]).all(), case
        assert (found[3][[0, 2]] == 7).all()
        assert not found[3][1].any()
        assert (found[4] == 7).all()


def test_a_sequence_with_right_lengths_is_right_beside_made_up_ones(run):
    case, attributes = random_case(25, 3, 1, 2, 8, 64, 32, [40, 40, 40], [1, 1, 1])
    case = rounded(case, "float16")
    expected = partial_rope_gqa_attention(**case, attributes=attributes)[0]
    case["past_lengths"] = np.array([-7, 40, 10**9], np.int32)
    output = run(case, attributes, SMALL)[0]
    np.testing.assert_allclose(output[1], expected[1], atol=TOLERANCE["float16"])


def test_one_block_does_everything(run):
    tiles = replace(SMALL, blocks=1, min_tiles=1)
    check(run, *random_case(10, 3, 1, 2, 4, 64, 32, [40, 0, 17], [1, 1, 1]), [1, 1, 1], tiles)


@pytest.mark.parametrize(
    ("phase", "sequence", "past"),
    [("prefill", 1, 0), ("prefill", 1, 40), ("prefill", 30, 17), ("decode", 1, 100), ("decode", 2, 33)],
)
def test_kernels_of_one_phase(run, phase, sequence, past):
    """For engines of one phase; a prefill kernel takes a single token too."""
    case, attributes = random_case(15, 1, sequence, 2, 8, 64, 32, [past], [sequence])
    check(run, case, attributes, [sequence], phase=phase)


def test_a_decode_kernel_refuses_more_tokens_than_it_takes(run):
    case, attributes = random_case(16, 1, 3, 2, 8, 64, 32, [5], [3])
    with pytest.raises(ValueError, match="3 new tokens; a decode kernel for this shape takes 2"):
        run(case, attributes, SMALL, phase="decode")


@pytest.mark.parametrize("capacity", [5, 24])
def test_a_full_cache_is_not_overrun(run, capacity):
    """Right padding may reach beyond the cache; only valid tokens are stored."""
    case, attributes = random_case(11, 1, 4, 1, 4, 64, 32, [capacity - 2], [2], slack=0)
    for name in ("past_key", "past_value"):
        case[name] = case[name][:, :, :capacity].copy()
    _, keys, _, _, _ = run(rounded(case, "float16"), attributes, SMALL)
    assert keys.shape[2] == capacity
    grown = {name: np.pad(case[name], [(0, 0)] * 2 + [(0, 2), (0, 0)]) for name in ("past_key", "past_value")}
    expected = partial_rope_gqa_attention(**rounded(case | grown, "float16"), attributes=attributes)
    np.testing.assert_allclose(keys[0, :, :capacity], expected[1][0, :, :capacity], atol=2e-3)


def test_chunks_continue_each_other(run):
    """Prefill in three chunks and two decode steps through one cache, as a session does."""
    whole, attributes = random_case(12, 1, 40, 2, 4, 64, 32, [0], [40])
    whole = rounded(whole, "float16")
    keys, values = np.full_like(whole["past_key"], np.nan), np.full_like(whole["past_value"], np.nan)
    outputs = []
    for start, stop in ((0, 17), (17, 36), (36, 38), (38, 39), (39, 40)):
        part = whole | {name: whole[name][:, start:stop] for name in ("query", "key", "value")}
        part |= dict(past_key=keys, past_value=values)
        part |= dict(
            past_lengths=np.array([start], np.int32), query_lengths=np.array([stop - start], np.int32)
        )
        output, keys, values, _, _ = run(part, attributes, SMALL)
        outputs.append(output)
    expected = partial_rope_gqa_attention(**whole, attributes=attributes)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected[0], atol=3e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("sequence", "lengths"), [(1, [1, 1]), (21, [21, 9])])
def test_int8_cache(run, dtype, sequence, lengths):
    """Against the same meaning on dequantized caches: scales per channel change nothing but the storage."""
    case, attributes = random_case(13, 2, sequence, 2, 4, 64, 32, [50, 17], lengths)
    case = rounded(case, dtype)
    rng = np.random.default_rng(13)
    scales = {n: rng.uniform(0.01, 0.04, (2, 64)).astype(np.float32) for n in ("key_scale", "value_scale")}
    steps = {
        name: scale[None, :, None]
        for name, scale in zip(("past_key", "past_value"), scales.values(), strict=True)
    }
    stored = {
        name: np.clip(np.rint(case[name] / step), -127, 127).astype(np.int8) for name, step in steps.items()
    }
    output, keys, values, counters, _ = run(case | stored, attributes, SMALL, dtype, **scales)

    # What the new tokens become in the cache follows from the kernel's own rotation; then all is as if exact.
    dequantized = {name: array * steps[name] for name, array in stored.items()}
    exact = partial_rope_gqa_attention(**(case | dequantized), attributes=attributes)
    present = dict(past_key=keys * steps["past_key"], past_value=values * steps["past_value"])
    group = attributes.num_heads // attributes.kv_num_heads
    for b, new in enumerate(lengths):
        past = int(case["past_lengths"][b])
        for name, theirs in zip(steps, exact[1:], strict=True):
            limit = np.minimum(np.abs(theirs[b, :, past : past + new]), 127 * steps[name][0])
            ours = np.abs(present[name][b, :, past : past + new])
            assert (np.abs(ours - limit) <= 0.51 * steps[name][0] + 2.5e-2).all()
        for i in range(new):
            row = case | {n: case[n][b : b + 1, i : i + 1] for n in ("query", "key", "value")}
            row |= {n: array[b : b + 1].copy() for n, array in present.items()}
            row |= dict(past_lengths=case["past_lengths"][b : b + 1] + i, query_lengths=np.ones(1, np.int32))
            expected = attended(row, attributes, group)
            np.testing.assert_allclose(output[b, i], expected, atol=1.5 * TOLERANCE[dtype])
        assert (keys[b, :, past + new :] == stored["past_key"][b, :, past + new :]).all()
    assert not counters.any()


@pytest.mark.parametrize(("sequence", "lengths"), [(1, [1, 1]), (5, [5, 3]), (70, [70, 9])])
def test_fp8_cache(run, sequence, lengths):
    """Old keys as they were stored, new ones saturated and rounded to even, then all as if exact."""
    case, attributes = random_case(26, 2, sequence, 2, 4, 64, 32, [50, 17], lengths)
    case = rounded(case, "float16")
    case["value"][0, 0, :3] = (3000.0, -3000.0, 0.0)  # beyond what fp8 holds at this scale
    rng = np.random.default_rng(26)
    scales = {n: rng.uniform(0.01, 0.1, (2, 64)).astype(np.float32) for n in ("key_scale", "value_scale")}
    steps = dict(zip(("past_key", "past_value"), (s[None, :, None] for s in scales.values()), strict=True))
    codes = {
        name: torch.from_numpy(case[name] / step).clamp(-448, 448).to(torch.float8_e4m3fn)
        for name, step in steps.items()
    }
    stored = {name: code.view(torch.uint8).numpy() for name, code in codes.items()}
    output, keys, values, counters, _ = run(case | stored, attributes, SMALL, "float16", **scales)
    present = dict(past_key=keys * steps["past_key"], past_value=values * steps["past_value"])
    exact = partial_rope_gqa_attention(
        **(case | {n: c.float().numpy() * steps[n] for n, c in codes.items()}), attributes=attributes
    )
    group = attributes.num_heads // attributes.kv_num_heads
    for b, new in enumerate(lengths):
        past = int(case["past_lengths"][b])
        for (name, step), theirs in zip(steps.items(), exact[1:], strict=True):
            rows = slice(past, past + new)
            wanted = torch.from_numpy(theirs[b, :, rows] / step[0]).clamp(-448, 448).to(torch.float8_e4m3fn)
            found = present[name][b, :, rows] / step[0]
            # A key that lies between two codes may fall to either: its own rotation rounds too.
            np.testing.assert_allclose(found, wanted.float().numpy(), rtol=0.13, atol=0.5)
            np.testing.assert_array_equal(
                present[name][b, :, :past], codes[name][b, :, :past].float().numpy() * step[0]
            )
        for i in range(0, new, 7):
            row = case | {n: case[n][b : b + 1, i : i + 1] for n in ("query", "key", "value")}
            row |= {n: array[b : b + 1].copy() for n, array in present.items()}
            row |= dict(past_lengths=case["past_lengths"][b : b + 1] + i, query_lengths=np.ones(1, np.int32))
            np.testing.assert_allclose(output[b, i], attended(row, attributes, group), atol=6e-3, rtol=2e-3)
    limit = 448 * scales["value_scale"][0]
    np.testing.assert_allclose(present["past_value"][0, 0, 50, :2], (limit[0], -limit[1]), rtol=1e-6)
    assert not counters.any()


def test_numbers_between_two_steps_of_int8_go_to_the_even_one(run):
    case, attributes = random_case(27, 1, 1, 1, 4, 64, 32, [0], [1])
    case["value"][0, 0] = np.tile([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 200.0, -200.0], 8)
    stored = {name: np.zeros(case[name].shape, np.int8) for name in ("past_key", "past_value")}
    scales = {n: np.ones((1, 64), np.float32) for n in ("key_scale", "value_scale")}
    values = run(case | stored, attributes, SMALL, **scales)[2]
    np.testing.assert_array_equal(values[0, 0, 0], np.tile([0, 2, 2, 0, -2, -2, 127, -127], 8))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("without_past", [False, True])
def test_the_torch_operator_is_functional_and_falls_back(interpreted, dtype, without_past):
    """float32 is not the kernel's: there the operator computes by plain tensors, and agrees with itself."""
    case, attributes = random_case(14, 2, 9, 2, 4, 64, 32, [0, 0] if without_past else [20, 3], [9, 5])
    if without_past:
        case |= dict(past_key=None, past_value=None, past_lengths=None)
    by_kernel, plain, untouched = interpreted(run_operator, case, attributes, dtype)
    assert untouched
    np.testing.assert_allclose(by_kernel[0], plain[0], atol=TOLERANCE["float16"])
    for b, new in enumerate(case["query_lengths"]):
        end = new if without_past else case["past_lengths"][b] + new
        for ours, theirs in zip(by_kernel[1:], plain[1:], strict=True):
            np.testing.assert_allclose(ours[b, :, :end], theirs[b, :, :end], atol=8e-3)


def attended(row, attributes, group):
    """Attention of one token to a cache that has it already."""
    from glm4_plugins.operator import rotate_interleaved

    past = int(row["past_lengths"][0])
    head_size = row["past_key"].shape[3]
    query = row["query"][0, 0].reshape(-1, head_size).astype(np.float64)
    query = rotate_interleaved(
        query, row["cos"][past].astype(np.float64), row["sin"][past].astype(np.float64)
    )
    keys, values = (np.repeat(row[n][0, :, : past + 1], group, axis=0) for n in ("past_key", "past_value"))
    scores = np.einsum("hd,htd->ht", query, keys) * attributes.scale
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("ht,htd->hd", weights / weights.sum(axis=-1, keepdims=True), values).reshape(-1)
