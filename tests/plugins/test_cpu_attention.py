"""Attention on the CPU: every set of kernels against the NumPy meaning, and rows against themselves in other company."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
from attention_cases import random_case
from cpu_operators import needs_cpu_operators

from glm4_plugins.block_product import library
from glm4_plugins.operator import DOMAIN, INPUTS, OP_TYPE, OUTPUTS, VERSION, partial_rope_gqa_attention

pytestmark = needs_cpu_operators

KERNELS = ("avx512-vnni", "avx2", "portable")
# Where a processor multiplies and adds in one step; the portable kernels do in two.
FUSED = KERNELS[:2]
CACHES = ("past_key", "past_value")
SCALES = ("key_scale", "value_scale")


@pytest.fixture(scope="module")
def attend():
    function = ctypes.CDLL(str(library())).glm4_attention
    pointer = ctypes.c_void_p
    function.argtypes = [ctypes.c_char_p, pointer, ctypes.c_float, *[pointer] * 12]

    def run(name, case, attributes, key_scales=None, value_scales=None):
        batch, sequence, width = case["query"].shape
        _, kv_heads, capacity, dim = case["past_key"].shape
        rotary, group = attributes.rotary_embedding_dim, attributes.num_heads // kv_heads
        sizes = np.array(
            [batch, sequence, capacity, kv_heads, group, dim, rotary, len(case["cos"])], np.int64
        )
        keys, values = (case[name].copy() for name in CACHES)
        output = np.full((batch, sequence, width), np.nan, np.float32)
        arrays = [case["query"], case["key"], case["value"], keys, values, case["cos"], case["sin"]]
        arrays += [case["past_lengths"], case["query_lengths"], key_scales, value_scales, output]
        assert all(a is None or a.flags.c_contiguous for a in arrays)
        places = [None if a is None else a.ctypes.data for a in arrays]
        code = function(name and name.encode(), sizes.ctypes.data, attributes.scale, *places)
        if code == 1:
            pytest.skip(f"this processor does not run {name}")
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


@pytest.mark.parametrize("sizes", SIZES)
def test_fused_kernels_agree_bit_by_bit(attend, sizes):
    case, attributes = case_of(sizes)
    first, second = (attend(kernels, case, attributes) for kernels in FUSED)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def with_int8_cache(case):
    """The case with a random int8 cache, and the scales of its keys and values."""
    rng = np.random.default_rng(1)
    _, kv_heads, _, dim = case["past_key"].shape
    scales = [rng.uniform(0.01, 0.03, (kv_heads, dim)).astype(np.float32) for _ in CACHES]
    return case | {name: rng.integers(-128, 128, case[name].shape, np.int8) for name in CACHES}, scales


@pytest.mark.parametrize("sizes", SIZES)
def test_fused_kernels_agree_bit_by_bit_over_an_int8_cache(attend, sizes):
    case, attributes = case_of(sizes)
    case, scales = with_int8_cache(case)
    first, second = (attend(kernels, case, attributes, *scales) for kernels in FUSED)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kernels", KERNELS)
def test_an_int8_cache_saturates_what_is_not_finite(attend, kernels):
    case, attributes = case_of("decode of the 9B")
    case, scales = with_int8_cache(case)
    case["value"][0, 0, :3] = np.inf, -np.inf, np.nan
    _, _, values = attend(kernels, case, attributes, *scales)
    np.testing.assert_array_equal(values[0, 0, 513, :3], [127, -128, -128])


def sequence_of(case, b, start, stop):
    """Tokens start ... stop - 1 of one sequence of a case, after those before them."""
    part = {name: array[b : b + 1] for name, array in case.items() if name not in ("cos", "sin")}
    for name in ("query", "key", "value"):
        part[name] = np.ascontiguousarray(part[name][:, start:stop])
    part["past_lengths"] = part["past_lengths"] + np.int32(start)
    part["query_lengths"] = np.array([stop - start], np.int32)
    return part | {"cos": case["cos"], "sin": case["sin"]}


@pytest.mark.parametrize("kernels", [None, "portable"])
@pytest.mark.parametrize("sizes", ["prompt over chunks", "several tokens after several pasts", "odd head"])
@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_any_part_of_a_prompt(attend, kernels, sizes, step):
    case, attributes = case_of(sizes)
    output, keys, values = attend(kernels, case, attributes)
    for b, length in enumerate(case["query_lengths"]):
        caches = {name: case[name][b : b + 1] for name in CACHES}
        for start in range(0, length, step):
            stop = min(start + step, length)
            part, *written = attend(kernels, sequence_of(case, b, start, stop) | caches, attributes)
            np.testing.assert_array_equal(part[0], output[b, start:stop])
            caches = dict(zip(CACHES, written, strict=True))
        np.testing.assert_array_equal(caches["past_key"][0], keys[b])
        np.testing.assert_array_equal(caches["past_value"][0], values[b])


@pytest.mark.parametrize("kernels", KERNELS)
def test_what_lies_past_the_end_or_in_other_sequences_is_not_read(attend, kernels):
    case, attributes = case_of("several tokens after several pasts")
    clean, _, _ = attend(kernels, case, attributes)
    poisoned = {name: array.copy() for name, array in case.items()}
    for b, (past, length) in enumerate(zip(case["past_lengths"], case["query_lengths"], strict=True)):
        for name in CACHES:
            poisoned[name][b, :, past:] = np.nan
        for name in ("query", "key", "value"):
            poisoned[name][b, length:] = np.nan
    poisoned["past_key"][1] = np.nan
    output, _, _ = attend(kernels, poisoned, attributes)
    assert np.isnan(output[1, :3]).all()
    for b in (0, 2, 3):
        length = case["query_lengths"][b]
        np.testing.assert_array_equal(output[b, :length], clean[b, :length])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    "sizes", ["decode of the 9B", "several tokens after several pasts", "prompt over chunks"]
)
def test_an_int8_cache(attend, kernels, sizes):
    """Against attention over what the stored numbers stand for."""
    case, attributes = case_of(sizes)
    _, kv_heads, _, dim = case["past_key"].shape
    stored, scales = with_int8_cache(case)
    meant = case | {
        name: stored[name] * scale[None, :, None] for name, scale in zip(CACHES, scales, strict=True)
    }
    _, *exact = partial_rope_gqa_attention(**meant, attributes=attributes)
    output, *written = attend(kernels, stored, attributes, *scales)
    unrotated = attributes.__class__(attributes.num_heads, kv_heads, 0, attributes.scale)
    for b, (past, length) in enumerate(zip(case["past_lengths"], case["query_lengths"], strict=True)):
        end, caches = past + length, []
        for new, wide, scale in zip(written, exact, scales, strict=True):
            numbers = wide[b, :, past:end] / scale[:, None]
            # the nearest number, but for what lies between two, and saturated
            assert np.abs(new[b, :, past:end] - numbers.clip(-128, 127)).max() <= 0.5 + 1e-4
            assert (np.abs(numbers) > 128).any()
            caches.append((new[b : b + 1] * scale[None, :, None])[:, :, :end])
        # what was stored is attended to, the new tokens' own included: as if all had been there before
        turned = sequence_of(case, b, 0, length)
        for i in range(length):
            query = turned["query"][:, i : i + 1].reshape(-1, dim).copy()
            half = attributes.rotary_embedding_dim // 2
            c, s = case["cos"][past + i, :half], case["sin"][past + i, :half]
            even, odd = query[:, 0 : 2 * half : 2].copy(), query[:, 1 : 2 * half : 2].copy()
            query[:, 0 : 2 * half : 2], query[:, 1 : 2 * half : 2] = even * c - odd * s, even * s + odd * c
            last = past + i
            step = {
                name: np.ascontiguousarray(cache[:, :, : last + 1])
                for name, cache in zip(CACHES, caches, strict=True)
            }
            row = {"key": step["past_key"][:, :, last], "value": step["past_value"][:, :, last]}
            row = {name: np.ascontiguousarray(array).reshape(1, 1, -1) for name, array in row.items()}
            lengths = {"past_lengths": np.array([last], np.int32), "query_lengths": np.ones(1, np.int32)}
            tables = {"cos": np.zeros((end, 0), np.float32), "sin": np.zeros((end, 0), np.float32)}
            expected, _, _ = partial_rope_gqa_attention(
                query=query.reshape(1, 1, -1), **row, **step, **tables, **lengths, attributes=unrotated
            )
            np.testing.assert_allclose(output[b, i], expected[0, 0], rtol=1e-4, atol=1e-4)


def test_impossible_attention_is_refused(attend):
    case, attributes = case_of("several tokens after several pasts")
    capacity = case["past_key"].shape[2]
    for change in (
        {"past_lengths": np.array([0, 1, 2, capacity], np.int32)},
        {"past_lengths": np.array([0, 1, 2, -1], np.int32)},
        {"query_lengths": np.array([6, 1, 1, 1], np.int32)},
        {"cos": case["cos"][:100], "sin": case["sin"][:100]},
        {"past_key": np.zeros((4, 1, 9, 1 << 17), np.float32), "past_lengths": np.zeros(4, np.int32)},
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


def node_session(attributes, cache_type=np.float32, scales=(), threads=2, lacking=()):
    """The operator alone in a graph."""
    names = [*("" if name in lacking else name for name in INPUTS), *scales]
    node = onnx.helper.make_node(OP_TYPE, names, list(OUTPUTS), domain=DOMAIN, **vars(attributes))
    types = dict.fromkeys(CACHES, cache_type) | dict.fromkeys(("past_lengths", "query_lengths"), np.int32)

    def value(name, rank):
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(types.get(name, np.float32)))
        return onnx.helper.make_tensor_value_info(name, kind, [None] * rank)

    inputs = [value(name, 4 if name in CACHES else 1 if "lengths" in name else 3) for name in names if name]
    for given in inputs:
        if given.name in ("cos", "sin", *scales):
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


def test_a_present_bound_to_its_past_is_written_in_place(attend):
    case, attributes = case_of("several tokens after several pasts")
    expected, *caches = attend(None, case, attributes)
    session = node_session(attributes)
    binding = session.io_binding()
    for name, array in case.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for past, present in zip(CACHES, OUTPUTS[1:], strict=True):
        array = case[past]
        binding.bind_output(present, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    output = np.zeros_like(expected)
    binding.bind_output(OUTPUTS[0], "cpu", 0, output.dtype, output.shape, output.ctypes.data)
    session.run_with_iobinding(binding)
    for past, written in zip(CACHES, caches, strict=True):
        np.testing.assert_array_equal(case[past], written)
    for b, length in enumerate(case["query_lengths"]):
        np.testing.assert_array_equal(output[b, :length], expected[b, :length])


def test_onnx_runtime_takes_an_int8_cache(attend):
    case, attributes = case_of("several tokens after several pasts")
    case, scales = with_int8_cache(case)
    expected = attend(None, case, attributes, *scales)
    found = node_session(attributes, np.int8, SCALES).run(None, case | dict(zip(SCALES, scales, strict=True)))
    assert [array.dtype for array in found] == [np.float32, np.int8, np.int8]
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


def test_onnx_runtime_hears_of_scales_without_an_int8_cache():
    case, attributes = case_of("several tokens after several pasts")
    scales = {name: np.ones((2, 24), np.float32) for name in SCALES}
    with pytest.raises(Exception, match="scales are of an int8 cache"):
        node_session(attributes, scales=SCALES).run(None, case | scales)
