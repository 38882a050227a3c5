"""What can be exported: targets, precisions, and which ONNX Runtime providers run the result."""

from collections.abc import Mapping
from dataclasses import dataclass

from glm4_runtime.errors import ExportError


@dataclass(frozen=True)
class Target:
    """A form of bundle. ``providers`` lists, per precision, those that have every kernel the graph needs.

    ``engine`` names the TensorRT that builds an engine from the graph; ``providers`` then run only the graph.
    """

    dialect: str
    providers: Mapping[str, tuple[str, ...]]
    engine: str | None = None


@dataclass(frozen=True)
class Precision:
    """``weights`` and ``activations`` are element types; the cache has the activations'."""

    weights: str
    activations: str


PRECISIONS = {
    "fp32": Precision("float32", "float32"),
    "fp16": Precision("float16", "float16"),
    "bf16": Precision("bfloat16", "bfloat16"),
}

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# ONNX Runtime's kernel list (docs/OperatorKernels.md): GroupQueryAttention on CUDA takes fp16 and bf16 only,
# and nothing that attention needs takes bf16 on the CPU. The native dialect was not tried on CUDA.
TARGETS = {
    "ort": Target("ort", {"fp32": (_CPU,), "fp16": (_CUDA, _CPU), "bf16": (_CUDA,)}),
    "native": Target("native", {"fp32": (_CPU,), "fp16": (_CPU,), "bf16": ()}),
    "tensorrt-rtx": Target("native", {"fp16": (_CPU,), "bf16": ()}, engine="tensorrt-rtx"),
    "tensorrt": Target("native", {"fp16": (_CPU,), "bf16": ()}, engine="tensorrt"),
}


def require_target(target: str, precision: str) -> tuple[Target, Precision]:
    """The rows of both tables.

    Raises:
        ExportError: an unknown name, or a pair that cannot be exported; lists what can.
    """
    if target not in TARGETS:
        raise ExportError(f"unknown target {target!r}; the targets are {', '.join(TARGETS)}")
    if precision not in PRECISIONS or precision not in TARGETS[target].providers:
        raise ExportError(
            f"target {target} has no precision {precision!r}; it has {', '.join(TARGETS[target].providers)}"
        )
    return TARGETS[target], PRECISIONS[precision]
