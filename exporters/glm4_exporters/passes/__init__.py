"""Passes take the canonical graph to a dialect: one file, one verb, one test each."""

from collections.abc import Callable

import onnx_ir as ir

from glm4_exporters.passes.group_query_attention import GroupQueryAttention
from glm4_exporters.passes.native_attention import NativeAttention
from glm4_exporters.passes.skip_norm import SkipNorm
from glm4_exporters.passes.transposed_matmul import TransposedMatMul

DIALECTS: dict[str, tuple[Callable[[], ir.passes.InPlacePass], ...]] = {
    "native": (NativeAttention,),
    "ort": (GroupQueryAttention, NativeAttention, TransposedMatMul, SkipNorm),
    "cpu": (TransposedMatMul, SkipNorm),  # attention is an operator of ours as it stands
}


def lower(model: ir.Model, dialect: str) -> ir.Model:
    """Take a canonical graph to ``dialect``, in place."""
    for make in DIALECTS[dialect]:
        make()(model)
    return model
