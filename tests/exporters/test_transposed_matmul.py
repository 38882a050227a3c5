"""Products by transposed weights: the checkpoint's layout stays, and so does what is computed."""

from graphs import assert_same_function, counts, session, traced

from glm4_exporters.passes.native_attention import NativeAttention
from glm4_exporters.passes.transposed_matmul import TransposedMatMul


def test_transposed_matmul_keeps_the_checkpoints_layout():
    model = traced()
    plain = session(attention_lowered(traced()))
    assert TransposedMatMul()(model).modified
    assert counts(model)["FusedMatMul"] == 13
    assert not counts(model)["MatMul"] + counts(model)["Transpose"]
    assert not TransposedMatMul()(model).modified
    assert_same_function(plain, session(attention_lowered(model)))


def attention_lowered(model):
    NativeAttention()(model)
    return model
