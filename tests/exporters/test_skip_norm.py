"""Residual sums fused with the norms that read them."""

from graphs import assert_same_function, counts, session, traced

from glm4_exporters.passes.native_attention import NativeAttention
from glm4_exporters.passes.skip_norm import SkipNorm


def test_skip_norm_fuses_every_residual():
    model = traced()
    plain = session(attention_lowered(traced()))
    assert SkipNorm()(model).modified
    found = counts(model)
    # Two residuals per layer; the first norm of all reads the embedding, the sandwich norms no sum.
    assert found["SkipSimplifiedLayerNormalization"] == 4
    assert found["RMSNormalization"] == 5
    assert found["Add"] == 6  # the biases
    assert not SkipNorm()(model).modified
    assert_same_function(plain, session(attention_lowered(model)))


def attention_lowered(model):
    NativeAttention()(model)
    return model
