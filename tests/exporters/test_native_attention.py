"""Attention by standard operators: what the operator means, for heads of any size."""

import pytest
from graphs import SIZES, assert_the_old_cache_stays, attention_case, check_against_numpy, run_attention

from glm4_exporters.passes.native_attention import NativeAttention


@pytest.mark.parametrize("sizes", [*SIZES, (2, 1, 10, 4), (4, 4, 18, 6)])
@pytest.mark.parametrize(
    ("pasts", "lengths", "sequence"),
    [([0], [5], 5), ([3, 9, 0], [1, 1, 1], 1), ([19, 2], [5, 4], 5), ([4, 0, 11], [2, 6, 1], 6)],
)
def test_native_attention_is_the_operator(sizes, pasts, lengths, sequence):
    case, attributes = attention_case(2, len(pasts), sequence, *sizes, pasts, lengths)
    check_against_numpy(case, attributes, run_attention(NativeAttention, case, attributes, sizes[2]))


def test_a_padded_chunk_leaves_the_old_cache_alone():
    assert_the_old_cache_stays(NativeAttention)
