"""Attention on the CPU: every set of kernels against the NumPy meaning, and rows against themselves in other company."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from attention_cases import random_case
from cpu_operators import KERNELS, needs_cpu_operators

from glm4_plugins.block_product import library
from glm4_plugins.operator import DOMAIN, INPUTS, OP_TYPE, OUTPUTS, VERSION, partial_rope_gqa_attention

pytestmark = needs_cpu_operators

# Where a processor multiplies and adds in one step; the portable kernels do in two.
FUSED = [name for name in KERNELS if name != "portable"] or ["portable"]
CACHES = ("past_key", "past_value")
FACTORS = "key_factors"
# By name in a manifest: the kernels' number, and the arrays' type here.
TYPES = {
    "float32": (0, np.float32),
    "float16": (1, np.float16),
    "bfloat16": (2, ml_dtypes.bfloat16),
    "int8-rows": (3, np.int8),
}
NARROW = tuple(TYPES)[1:]


@pytest.fixture(scope="module")
def attend():
    function = ctypes.CDLL(str(library())).glm4_attention
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_char_p, pointer, ctypes.c_int, ctypes.c_float, *[pointer] * 11]

    def run(name, case, attributes, kind="float32"):
        batch, sequence, width = case["query"].shape
        _, kv_heads, capacity, _ = case["past_key"].shape
        dim, group = width // attributes.num_heads, attributes.num_heads // kv_heads
        sizes = [batch, sequence, capacity, kv_heads, group, dim]
        sizes = np.array([*sizes, attributes.rotary_embedding_dim, len(case["cos"])], np.int64)
        keys, values = (case[name].copy() for name in CACHES)
        output = np.full((batch, sequence, width), np.nan, np.float32)
        arrays = [case["query"], case["key"], case["value"], keys, values, case["cos"], case["sin"]]
        arrays += [case["past_lengths"], case["query_lengths"], case.get(FACTORS), output]
        assert all(a is None or a.flags.c_contiguous for a in arrays)
        assert keys.dtype == values.dtype == TYPES[kind][1]
        places = [None if a is None else a.ctypes.data for a in arrays]
        code = function(name and name.encode(), sizes.ctypes.data, TYPES[kind][0], attributes.scale, *places)
        return code if code else (output, keys, values)

    return run


# batch, sequence, kv heads, group, head size, rotary, pasts, lengths
SIZES = {
    "decode of the 9B": (1, 1, 2, 16, 128, 64, [513], [1]),
    "decode of the 32B": (3, 1, 8, 6, 128, 64, [5, 0, 300], [1, 1, 1]),
    "prompt": (1, 70, 2, 4, 32, 16, [0], [70]),
    "prompt over chunks": (1, 300, 1, 2, 16, 8, [250], [300]),
    "several tokens after several pasts": (4, 5, 2, 3, 24, 12, [0, 255, 256, 600], [5, 3, 5, 1]),
    "nothing for one": (2, 3, 1, 1, 8, 0, [4, 9], [0, 3]),
    "odd head": (2, 7, 2, 2, 18, 10, [3, 70], [7, 6]),
    "one query head for each key head": (1, 130, 3, 1, 64, 64, [10], [130]),
    "many query heads": (1, 2, 1, 128, 40, 20, [300], [2]),
}


def case_of(name, seed=0):
    return random_case(seed, *SIZES[name])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("sizes", SIZES)
def test_kernels_compute_what_the_operator_means(attend, kernels, sizes):
    case, attributes = case_of(sizes)
    expected, expected_keys, expected_values = partial_rope_gqa_attention(**case, attributes=attributes)
    output, keys, values = attend(kernels, case, attributes)
    for b, (past, length) in enumerate(zip(case["past_lengths"], case["query_lengths"], strict=True)):
        np.testing.assert_allclose(output[b, :length], expected[b, :length], rtol=2e-5, atol=2e-5)
        end = past + length
        np.testing.assert_allclose(keys[b, :, :end], expected_keys[b, :, :end], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(values[b, :, :end], expected_values[b, :, :end])
        # nothing is written past the sequence's end
        np.testing.assert_array_equal(keys[b, :, end:], case["past_key"][b, :, end:])
        np.testing.assert_array_equal(values[b, :, end:], case["past_value"][b, :, end:])


SHARED = ("cos", "sin", FACTORS)  # by all sequences


# Caches of other types ----------------------------------------------------------------------------


def stored(x, kind):
    """Keys or values [..., D] as rows of a cache, by the rules in attention.h."""
    if kind == "float16":
        return x.clip(-65504, 65504).astype(np.float16)
    if kind != "int8-rows":
        return x.astype(TYPES[kind][1])
    largest = np.abs(x).max(-1, keepdims=True)
    numbers = np.rint(x * (np.float32(127) / largest)).astype(np.int8)
    scales = (largest / np.float32(127)).astype(np.float32)
    return np.concatenate([numbers, scales.view(np.int8)], -1)


def meant(rows, kind):
    """The float32 numbers that rows of a cache stand for."""
    if kind != "int8-rows":
        return rows.astype(np.float32)
    numbers, scales = rows[..., :-4], np.ascontiguousarray(rows[..., -4:]).view(np.float32)
    return numbers * scales


def narrow(case, kind):
    """The case with its past in a cache of this type; keys of int8 are divided by random factors."""
    past = {name: case[name] for name in CACHES}
    if kind == "int8-rows":
        shape = past["past_key"].shape[1], 1, past["past_key"].shape[3]
        factors = np.random.default_rng(1).uniform(0.2, 1, shape).astype(np.float32)
        past["past_key"] = past["past_key"] / factors
        case = case | {FACTORS: factors[:, 0].copy()}
    return case | {name: stored(array, kind) for name, array in past.items()}


def widened(case, keys, values, kind):
    """The keys and values that a cache stands for."""
    factors = case[FACTORS][:, None] if FACTORS in case else np.float32(1)
    return meant(keys, kind) * factors, meant(values, kind)


def rotated(x, case, past, rotary):
    """x [S, heads, D], rotated from position ``past`` on."""
    new = slice(past, past + len(x))
    c, s = case["cos"][new, None], case["sin"][new, None]
    y = x.copy()
    even, odd = x[..., 0:rotary:2], x[..., 1:rotary:2]
    y[..., 0:rotary:2], y[..., 1:rotary:2] = even * c - odd * s, even * s + odd * c
    return y


def attended(case, attributes, keys, values, b):
    """Attention of sequence b over all that the cache holds, its own new tokens included, in float64."""
    past, length = int(case["past_lengths"][b]), int(case["query_lengths"][b])
    heads, kv_heads = attributes.num_heads, attributes.kv_num_heads
    queries = case["query"][b, :length].reshape(length, heads, keys.shape[-1])
    queries = rotated(queries, case, past, attributes.rotary_embedding_dim).astype(np.float64)
    group = np.arange(heads) // (heads // kv_heads)
    k, v = (each[b, group, : past + length].astype(np.float64) for each in (keys, values))
    scores = np.einsum("shd,hcd->hsc", queries, k) * attributes.scale
    hidden = np.arange(past + length) > past + np.arange(length)[:, None]
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hsc,hcd->shd", weights, v).reshape(length, heads * v.shape[-1])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_narrow_cache_stores_rounded_rows_and_attends_to_them(attend, kernels, kind, sizes):
    case, attributes = case_of(sizes)
    case = narrow(case, kind)
    output, *caches = attend(kernels, case, attributes, kind)
    keys, values = widened(case, *caches, kind)
    for b, (past, length) in enumerate(zip(case["past_lengths"], case["query_lengths"], strict=True)):
        new = slice(past, past + length)
        shape = length, attributes.kv_num_heads, values.shape[-1]
        key = rotated(case["key"][b, :length].reshape(shape), case, past, attributes.rotary_embedding_dim)
        value = case["value"][b, :length].reshape(shape)
        factors = case.get(FACTORS, np.float32(1))
        for written, exact in zip(caches, (key / factors, value), strict=True):
            wanted, found = (
                meant(rows, kind) for rows in (stored(exact, kind), written[b, :, new].swapaxes(0, 1))
            )
            step = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "int8-rows": 1 / 127}[kind]
            # a number half way between two may round to either, as sums differ in the last bit
            off = np.abs(found - wanted)
            assert (off > 1e-6).sum() <= 1e-3 * off.size
            assert off.max(initial=0) <= step * np.abs(wanted).max(initial=0) * 1.01
        wanted = attended(case, attributes, keys, values, b)
        np.testing.assert_allclose(output[b, :length], wanted, rtol=3e-5, atol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_kernels_agree_bit_by_bit(attend, kind, sizes):
    """With an int8 cache all of them: their sums are of integers."""
    case, attributes = case_of(sizes)
    case = narrow(case, kind)
    first, *others = (
        attend(kernels, case, attributes, kind) for kernels in (KERNELS if kind == "int8-rows" else FUSED)
    )
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_narrow_cache_of_numbers_that_are_not_finite(attend, kernels):
    case, attributes = case_of("decode of the 9B")
    case["value"][0, 0, :4] = np.inf, -1e9, np.nan, 1e-7
    halves = narrow(case, "float16")
    _, _, values = attend(kernels, halves, attributes, "float16")
    np.testing.assert_array_equal(values[0, 0, 513, :3], np.array([65504, -65504, np.nan], np.float16))
    assert values[0, 0, 513, 3] == np.float16(1e-7) != 0
    output, _, values = attend(kernels, narrow(case, "int8-rows"), attributes, "int8-rows")
    row = values[0, 0, 513]
    assert np.isnan(row[-4:].view(np.float32)).all()
    assert not row[:-4].any()
    first, second = output[0, 0].reshape(2, -1)  # the heads of the first key head see the row
    assert np.isnan(first).all()
    assert np.isfinite(second).all()


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_rounding_to_16_bits(attend, kind):
    """Nearest, ties to even: all exponents, ties, numbers below the smallest normal one."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 1 << 32, 1 << 14, np.uint32) & ~np.uint32(0xFFF)
    x = (bits | np.where(rng.random(len(bits)) < 0.5, np.uint32(0x1000), np.uint32(0))).view(np.float32)
    x = np.concatenate([x, rng.normal(0, 2.0**-20, 1 << 12).astype(np.float32)])
    x = x[np.isfinite(x)][: 1 << 14]
    case, attributes = random_case(0, 1, len(x) // 64, 1, 1, 64, 0, [0], [len(x) // 64])
    case["value"] = x[: len(x) // 64 * 64].reshape(1, -1, 64).copy()
    case = narrow(case, kind)
    _, _, values = attend("portable", case, attributes, kind)
    with np.errstate(over="ignore"):
        wanted = stored(case["value"][0], kind)
    np.testing.assert_array_equal(values[0, 0, : len(wanted)].view(np.uint16), wanted.view(np.uint16))


def test_factors_keep_the_precision_of_small_channels(attend):
    """One channel that is large in every key, as by a bias: without factors it takes the others' precision."""
    case, attributes = random_case(0, 1, 40, 1, 2, 64, 0, [0], [40])
    case["key"][..., 5] += 300
    case["query"][..., 5] *= 0.01
    errors = {}
    for name, factor in (("without", 1.0), ("with", 300.0)):
        factors = np.ones((1, 64), np.float32)
        factors[0, 5] = factor
        given = narrow(case, "int8-rows") | {FACTORS: factors}
        exact, *_ = partial_rope_gqa_attention(**case, attributes=attributes)
        output, *_ = attend(None, given, attributes, "int8-rows")
        errors[name] = np.abs(output - exact).mean()
    assert errors["without"] > 0.1
    assert errors["with"] < 0.02


def sequence_of(case, b, start, stop):
    """Tokens start ... stop - 1 of one sequence of a case, after those before them."""
    part = {name: array[b : b + 1] for name, array in case.items() if name not in SHARED}
    for name in ("query", "key", "value"):
        part[name] = np.ascontiguousarray(part[name][:, start:stop])
    part["past_lengths"] = part["past_lengths"] + np.int32(start)
    part["query_lengths"] = np.array([stop - start], np.int32)
    return part | {name: case[name] for name in SHARED if name in case}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernels", [None, "portable"])
@pytest.mark.parametrize("sizes", ["prompt over chunks", "several tokens after several pasts", "odd head"])
@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_any_part_of_a_prompt(
    attend, kind, kernels, sizes, step
):
    case, attributes = case_of(sizes)
    case = narrow(case, kind)
    output, keys, values = attend(kernels, case, attributes, kind)
    for b, length in enumerate(case["query_lengths"]):
        caches = {name: case[name][b : b + 1] for name in CACHES}
        for start in range(0, length, step):
            stop = min(start + step, length)
            part, *written = attend(kernels, sequence_of(case, b, start, stop) | caches, attributes, kind)
            np.testing.assert_array_equal(part[0], output[b, start:stop])
            caches = dict(zip(CACHES, written, strict=True))
        np.testing.assert_array_equal(caches["past_key"][0], keys[b])
        np.testing.assert_array_equal(caches["past_value"][0], values[b])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_what_lies_past_the_end_or_in_other_sequences_is_not_read(attend, kernels, kind):
    case, attributes = case_of("several tokens after several pasts")
    case = narrow(case, kind)
    clean, _, _ = attend(kernels, case, attributes, kind)
    poisoned = {name: array.copy() for name, array in case.items()}
    poison = np.full(4, 0xFF, np.uint8).view(TYPES[kind][1])[:1]  # NaN, also as the scale of a row
    for b, (past, length) in enumerate(zip(case["past_lengths"], case["query_lengths"], strict=True)):
        for name in CACHES:
            poisoned[name][b, :, past:] = poison
        for name in ("query", "key", "value"):
            poisoned[name][b, length:] = np.nan
    poisoned["past_key"][1] = poison
    output, _, _ = attend(kernels, poisoned, attributes, kind)
    assert np.isnan(output[1, :3]).all()
    for b in (0, 2, 3):
        length = case["query_lengths"][b]
        np.testing.assert_array_equal(output[b, :length], clean[b, :length])


def test_impossible_attention_is_refused(attend):
    case, attributes = case_of("several tokens after several pasts")
    capacity = case["past_key"].shape[2]
    for change in (
        {"past_lengths": np.array([0, 1, 2, capacity], np.int32)},
        {"past_lengths": np.array([0, 1, 2, -1], np.int32)},
        {"query_lengths": np.array([6, 1, 1, 1], np.int32)},
        {"cos": case["cos"][:100], "sin": case["sin"][:100]},
        {"query": np.zeros((4, 1, 6 << 17), np.float32), "query_lengths": np.ones(4, np.int32)},
    ):
        assert attend(None, case | change, attributes) == 2, change


def test_no_rows_are_no_work(attend):
    case, attributes = case_of("several tokens after several pasts")
    none = {name: case[name][:, :0].copy() for name in ("query", "key", "value")}
    none["query_lengths"] = np.zeros(4, np.int32)
    output, keys, _ = attend(None, case | none, attributes)
    assert output.shape == (4, 0, 144)
    np.testing.assert_array_equal(keys, case["past_key"])


def test_very_large_scores(attend):
    case, attributes = case_of("prompt")
    case["query"] *= 1e4
    output, _, _ = attend(None, case, attributes)
    expected, _, _ = partial_rope_gqa_attention(**case, attributes=attributes)
    assert np.isfinite(output).all()
    np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-2)


# In ONNX Runtime ----------------------------------------------------------------------------------


PAST = (*CACHES, "past_lengths")


def node_session(attributes, kind="float32", factors=(), threads=2, lacking=()):
    """The operator alone in a graph."""
    names = [*("" if name in lacking else name for name in INPUTS), *factors]
    cache_type = TYPES[kind][1]
    node = onnx.helper.make_node(OP_TYPE, names, list(OUTPUTS), domain=DOMAIN, **vars(attributes))
    types = dict.fromkeys(CACHES, cache_type) | dict.fromkeys(("past_lengths", "query_lengths"), np.int32)

    def value(name, rank):
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(types.get(name, np.float32)))
        return onnx.helper.make_tensor_value_info(name, kind, [None] * rank)

    inputs = [value(name, 4 if name in CACHES else 1 if "lengths" in name else 3) for name in names if name]
    for given in inputs:
        if given.name in SHARED:
            given.CopyFrom(value(given.name, 2))
    outputs = [onnx.ValueInfoProto(name=name) for name in OUTPUTS]
    graph = onnx.helper.make_graph([node], "attention", inputs, outputs)
    opsets = [onnx.helper.make_opsetid(*domain) for domain in (("", 21), (DOMAIN, VERSION))]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library()))
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_onnx_runtime_runs_it_on_any_number_of_threads(attend, sizes, threads):
    case, attributes = case_of(sizes)
    expected = attend(None, case, attributes)
    found = node_session(attributes, threads=threads).run(None, case)
    for b, length in enumerate(case["query_lengths"]):
        np.testing.assert_array_equal(found[0][b, :length], expected[0][b, :length])
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])


def test_one_session_runs_many_at_once(attend):
    cases = [case_of("several tokens after several pasts", seed) for seed in range(8)]
    expected = [attend(None, case, attributes)[0] for case, attributes in cases]
    session = node_session(cases[0][1])
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, wanted in zip(
                pool.map(lambda one: session.run(None, one[0])[0], cases), expected, strict=True
            ):
                for b, length in enumerate(cases[0][0]["query_lengths"]):
                    np.testing.assert_array_equal(found[b, :length], wanted[b, :length])


def bind(binding, case, kind):
    """Inputs, and each present at the address of its past."""
    for name, array in case.items():
        element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        binding.bind_input(name, "cpu", 0, element, array.shape, array.ctypes.data)
    for past, present in zip(CACHES, OUTPUTS[1:], strict=True):
        array = case[past]
        element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        binding.bind_output(present, "cpu", 0, element, array.shape, array.ctypes.data)


@pytest.mark.parametrize("kind", TYPES)
def test_a_present_bound_to_its_past_is_written_in_place(attend, kind):
    case, attributes = case_of("several tokens after several pasts")
    case = narrow(case, kind)
    expected, *caches = attend(None, case, attributes, kind)
    session = node_session(attributes, kind, [FACTORS] if FACTORS in case else [])
    binding = session.io_binding()
    bind(binding, case, kind)
    output = np.zeros_like(expected)
    binding.bind_output(OUTPUTS[0], "cpu", 0, output.dtype, output.shape, output.ctypes.data)
    session.run_with_iobinding(binding)
    for past, written in zip(CACHES, caches, strict=True):
        np.testing.assert_array_equal(case[past], written)
    for b, length in enumerate(case["query_lengths"]):
        np.testing.assert_array_equal(output[b, :length], expected[b, :length])


@pytest.mark.parametrize("kind", ["float16", "int8-rows"])  # NumPy has no bfloat16
def test_a_present_of_its_own_starts_with_the_past(attend, kind):
    case, attributes = case_of("several tokens after several pasts")
    case = narrow(case, kind)
    expected = attend(None, case, attributes, kind)
    found = node_session(attributes, kind, [FACTORS] if FACTORS in case else []).run(None, case)
    assert [array.dtype for array in found] == [np.float32, TYPES[kind][1], TYPES[kind][1]]
    for b, length in enumerate(case["query_lengths"]):
        np.testing.assert_array_equal(found[0][b, :length], expected[0][b, :length])
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])


def test_without_a_past():
    """As in classifiers and encoders."""
    case, attributes = case_of("prompt")
    case["past_key"], case["past_value"] = (case[name][:, :, :70] for name in CACHES)
    expected, *_ = partial_rope_gqa_attention(**case, attributes=attributes)
    given = {name: array for name, array in case.items() if not name.startswith("past_")}
    output, keys, _ = node_session(attributes, lacking=PAST).run(None, given)
    np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-5)
    assert keys.shape == case["past_key"].shape


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"past_lengths": np.array([0, 1, 2, 10**6], np.int32)}, "a sequence does not fit into the cache"),
        (
            {"cos": np.zeros((9, 6), np.float32), "sin": np.zeros((9, 6), np.float32)},
            "longer than the cos and sin",
        ),
        ({"cos": np.zeros((999, 5), np.float32)}, "cos and sin are not"),
        ({"key": np.zeros((4, 4, 48), np.float32)}, "key, value or query_lengths does not fit"),
        (
            {"past_value": np.zeros((4, 2, 4, 24), np.float32)},
            "past_key, past_value or past_lengths does not fit",
        ),
        ({"query": np.zeros((4, 5, 145), np.float32)}, "query is not"),
    ],
)
def test_onnx_runtime_hears_what_is_wrong(change, why):
    case, attributes = case_of("several tokens after several pasts")
    session = node_session(attributes)
    with pytest.raises(Exception, match=f"PartialRopeGqaAttention: .*{why}"):
        session.run(None, case | change)


@pytest.mark.parametrize("lacking", [PAST[:1], PAST[1:2], PAST[2:], PAST[:2], PAST[1:]])
def test_onnx_runtime_hears_of_half_a_past(lacking):
    case, attributes = case_of("several tokens after several pasts")
    given = {name: array for name, array in case.items() if name not in lacking}
    with pytest.raises(Exception, match="come together or not at all"):
        node_session(attributes, lacking=lacking).run(None, given)


def test_onnx_runtime_hears_of_factors_that_do_not_fit():
    case, attributes = case_of("several tokens after several pasts")
    factors = {FACTORS: np.ones((2, 24), np.float32)}
    with pytest.raises(Exception, match="factors of the keys are for an int8 cache only"):
        node_session(attributes, factors=[FACTORS]).run(None, case | factors)
    rows = narrow(case, "int8-rows")
    with pytest.raises(Exception, match=r"factors of the keys are not \[kv_num_heads, head_size\]"):
        node_session(attributes, "int8-rows").run(None, {n: a for n, a in rows.items() if n != FACTORS})
