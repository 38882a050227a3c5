"""The largest errors of a sub-block, by its type of numbers, and the first sub-block that exceeds them.

The type is read from the sub-block's nodes and weights. In an int8 bundle the products are int8, but norms, sums and
attention have the activations' type, and its limits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from glm4_deploy import thresholds
from glm4_deploy.validate.drift import BlockError
from glm4_plugins.block_product import OPERATOR


@dataclass(frozen=True)
class Band:
    """Limits of relative errors.

    Attributes:
        local: over all positions, for a sub-block that reads the reference's values.
        worst: the same, at the worst position.
        drift: over all positions of the bundle's own run, with all earlier errors.
    """

    local: float
    worst: float
    drift: float


BANDS = {arithmetic: Band(**limits) for arithmetic, limits in thresholds.BAND_LIMITS.items()}  # finest first
ORDER = tuple(BANDS)


@dataclass(frozen=True)
class Culprit:
    """The sub-block that exceeds its band, and the reason."""

    error: BlockError
    why: str

    def as_dict(self) -> dict[str, object]:
        return {
            "layer": self.error.layer,
            "block": self.error.block,
            "covers": self.error.covers,
            "why": self.why,
        }


def is_out_of_band(error: BlockError) -> bool:
    """Whether a sub-block's own error is too large."""
    return _own_fault(error) is not None


def find_culprit(errors: Sequence[BlockError]) -> Culprit | None:
    """The first sub-block whose own error exceeds its band, or else the first whose drift does.

    An own error does not include earlier errors, so the order matters only if several sub-blocks are wrong.
    """
    for error in errors:
        fault = _own_fault(error)
        if fault is not None:
            return Culprit(error, fault)
    coarsest = 0
    for error in errors:
        coarsest = max(coarsest, ORDER.index(error.arithmetic))
        limit = BANDS[ORDER[coarsest]].drift
        if not error.drift.finite or error.drift.relative > limit:
            why = (
                f"no sub-block is wrong by itself, but their errors add up to {error.drift.relative:.2g} here, "
                f"where {ORDER[coarsest]} allows {limit:g}"
            )
            return Culprit(error, why)
    return None


def _own_fault(error: BlockError) -> str | None:
    local, band = error.local, BANDS[error.arithmetic]
    if local is None:
        return None
    if not local.finite:
        return "given the reference's input, it gives NaN or infinity"
    for value, limit, where in (
        (local.relative, band.local, ""),
        (local.worst, band.worst, " at its worst position"),
    ):
        if value > limit:
            return f"given the reference's input, it is {value:.2g} off{where}, where {error.arithmetic} allows {limit:g}"
    return None


def arithmetic_of(nodes: Sequence[onnx.NodeProto], types: Mapping[str, int]) -> str:
    """The coarsest type of numbers that some nodes compute with.

    Args:
        types: element types of the graph's weights and inputs, and of the nodes' outputs.
    """
    found = {"float32"}
    float8_scales = {
        node.output[0]
        for node in nodes
        if node.op_type == "DequantizeLinear" and types.get(node.input[0]) == onnx.TensorProto.FLOAT8E4M3FN
    }
    for node in nodes:
        kinds = {types.get(name, 0) for name in (*node.input, *node.output)}
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized", OPERATOR):
            bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
            found.add(f"int{bits}")
            if node.op_type == OPERATOR:
                continue  # its other types are float32, except the stored scales
        elif node.op_type in QUANTIZED_ACTIVATIONS and onnx.TensorProto.FLOAT8E4M3FN not in kinds:
            found.add("int8-sq")
        elif node.op_type == "DequantizeLinear" and node.input[1] in float8_scales:
            found.add("nvfp4")
        found.update(ARITHMETIC.get(kind, "float32") for kind in kinds)
    return max(found, key=ORDER.index)


QUANTIZED_ACTIVATIONS = ("QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "DynamicQuantizeMatMul")
ARITHMETIC: dict[int, str] = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.FLOAT8E4M3FN: "fp8",
}
