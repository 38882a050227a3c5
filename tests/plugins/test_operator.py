"""The NumPy meaning and the torch operator of glm4::PartialRopeGqaAttention, against each other and by hand."""

import numpy as np
import pytest
import torch
from attention_cases import random_case
from hypothesis import given, settings
from hypothesis import strategies as st

import glm4_plugins.torch  # noqa: F401  registers the torch operator
from glm4_plugins.operator import AttentionAttributes, output_shapes, partial_rope_gqa_attention


def in_torch(case, attributes):
    tensors = {k: None if v is None else torch.from_numpy(v) for k, v in case.items()}
    return [t.numpy() for t in torch.ops.glm4.partial_rope_gqa_attention(**tensors, **vars(attributes))]


@st.composite
def cases(draw):
    batch = draw(st.integers(1, 3))
    sequence = draw(st.integers(1, 5))
    head_size = draw(st.sampled_from([2, 8, 16]))
    rotary_dim = draw(st.sampled_from([d for d in (0, 2, 4, 8, 16) if d <= head_size]))
    pasts = [draw(st.integers(0, 6)) for _ in range(batch)]
    lengths = [draw(st.integers(0, sequence)) for _ in range(batch)]
    return random_case(
        draw(st.integers(0, 2**31)),
        batch,
        sequence,
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([1, 3, 16])),
        head_size,
        rotary_dim,
        pasts,
        lengths,
    )


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_torch_and_numpy_agree(case_and_attributes, without_past):
    case, attributes = case_and_attributes
    if without_past:
        case = case | dict(past_key=None, past_value=None, past_lengths=np.zeros_like(case["past_lengths"]))
    expected = partial_rope_gqa_attention(**case, attributes=attributes)
    actual = in_torch(case, attributes)
    for b, valid in enumerate(case["query_lengths"]):
        np.testing.assert_allclose(actual[0][b, :valid], expected[0][b, :valid], atol=2e-5)
        end = case["past_lengths"][b] + valid
        for ours, theirs in zip(actual[1:], expected[1:], strict=True):
            np.testing.assert_allclose(ours[b, :, :end], theirs[b, :, :end], atol=2e-6)


def test_one_token_by_hand():
    # One head of size 4, R = 2: the first pair turns by 90 degrees, the second passes through.
    query = np.array([[[1, 0, 1, 0]]], np.float32)
    key = np.array([[[1, 0, 0, 0]]], np.float32)
    value = np.array([[[5, 6, 7, 8]]], np.float32)
    past_key = np.zeros((1, 1, 2, 4), np.float32)
    past_value = np.zeros((1, 1, 2, 4), np.float32)
    cos, sin = np.array([[1.0], [0.0]], np.float32), np.array([[0.0], [1.0]], np.float32)
    output, present_key, _ = partial_rope_gqa_attention(
        query, key, value, past_key, past_value, cos, sin,
        np.array([1], np.int32), np.array([1], np.int32), AttentionAttributes(1, 1, 2, 1.0),
    )  # fmt: skip
    np.testing.assert_array_equal(present_key[0, 0, 1], [0, 1, 0, 0])
    weight = np.exp(1) / (np.exp(0) + np.exp(1))  # q . k = 1 for the new key, 0 for the past one
    np.testing.assert_allclose(output[0, 0], weight * value[0, 0], rtol=1e-6)


def test_chunks_equal_one_call():
    case, attributes = random_case(3, 1, 6, 2, 2, 8, 4, [0], [6])
    whole = partial_rope_gqa_attention(**case, attributes=attributes)
    keys, values, outputs = case["past_key"], case["past_value"], []
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        part = case | {name: case[name][:, start:stop] for name in ("query", "key", "value")}
        part |= dict(past_key=keys, past_value=values)
        part |= dict(
            past_lengths=np.array([start], np.int32), query_lengths=np.array([stop - start], np.int32)
        )
        output, keys, values = partial_rope_gqa_attention(**part, attributes=attributes)
        outputs.append(output)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole[0], atol=1e-6)
    np.testing.assert_array_equal(keys, whole[1])


def test_what_lies_past_the_sequence_is_never_read():
    case, attributes = random_case(4, 2, 3, 2, 2, 8, 4, [2, 4], [3, 1])
    clean = in_torch(case, attributes)[0]
    poisoned = {name: case[name].copy() for name in ("past_key", "past_value")}
    for b, past in enumerate(case["past_lengths"]):
        for array in poisoned.values():
            array[b, :, past:] = np.nan
    dirty = in_torch(case | poisoned, attributes)[0]
    np.testing.assert_array_equal(clean, dirty)


def test_padding_leaves_the_old_cache_alone():
    case, attributes = random_case(5, 2, 4, 2, 2, 8, 4, [3, 5], [1, 2])
    for present, past in zip(in_torch(case, attributes)[1:], ("past_key", "past_value"), strict=True):
        for b, length in enumerate(case["past_lengths"]):
            assert present[b, :, :length].tobytes() == case[past][b, :, :length].tobytes()


def test_a_sequence_that_does_not_fit_is_refused():
    case, attributes = random_case(6, 1, 4, 1, 1, 8, 4, [3], [4], slack=-1)
    with pytest.raises(ValueError, match="capacity 6"):
        partial_rope_gqa_attention(**case, attributes=attributes)
    with pytest.raises(ValueError, match="capacity 6"):
        in_torch(case, attributes)


@pytest.mark.parametrize(
    ("query", "key", "past", "message"),
    [
        ((1, 2, 30), (1, 2, 8), None, "4 heads"),
        ((1, 2, 32), (1, 2, 8), None, r"key \(1, 2, 8\) is not"),
        ((1, 2, 32), (1, 2, 16), (1, 2, 9, 4), "past_key"),
        ((1, 2, 8), (1, 2, 4), None, "exceeds the head size 2"),
    ],
)
def test_shape_rule_refuses(query, key, past, message):
    with pytest.raises(ValueError, match=message):
        output_shapes(query, key, past, AttentionAttributes(4, 2, 4, 0.5))


def test_the_operator_passes_torchs_own_checks():
    case, attributes = random_case(7, 2, 3, 2, 2, 8, 4, [2, 0], [3, 2])
    tensors = tuple(torch.from_numpy(v) for v in case.values())
    torch.library.opcheck(
        torch.ops.glm4.partial_rope_gqa_attention,
        (*tensors, *vars(attributes).values()),
        test_utils=("test_schema", "test_faketensor"),
    )
