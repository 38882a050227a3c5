"""Attention by ONNX Runtime's GroupQueryAttention: what the operator means, and which heads it takes."""

import pytest
from graphs import (
    SIZES,
    assert_the_old_cache_stays,
    attention_case,
    check_against_numpy,
    counts,
    lower,
    run_attention,
    traced,
)

from glm4_exporters.passes.group_query_attention import GroupQueryAttention


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("pasts", "lengths", "sequence"),
    [
        ([0], [5], 5),
        ([7], [4], 4),
        ([3, 9, 0], [1, 1, 1], 1),
        ([19], [5], 5),
        ([2], [2], 6),
        ([0, 0], [3, 5], 5),
    ],
)
def test_group_query_attention_is_the_operator(sizes, pasts, lengths, sequence):
    case, attributes = attention_case(1, len(pasts), sequence, *sizes, pasts, lengths)
    check_against_numpy(case, attributes, run_attention(GroupQueryAttention, case, attributes, sizes[2]))


def test_a_padded_chunk_leaves_the_old_cache_alone():
    assert_the_old_cache_stays(GroupQueryAttention)


def test_group_query_attention_leaves_odd_head_sizes_to_native():
    model = traced(head_dim=12)
    assert not GroupQueryAttention()(model).modified
    lower(model, "ort")
    assert counts(model)["Attention"] == 2
    assert not any(node.domain == "glm4" for node in model.graph)


def test_group_query_attention_rotates_in_the_kernel_where_it_can():
    inside, outside = traced(head_dim=32), traced(head_dim=16)
    GroupQueryAttention()(inside)
    GroupQueryAttention()(outside)
    assert counts(inside)["RotaryEmbedding"] == 0
    assert counts(outside)["RotaryEmbedding"] == 4
