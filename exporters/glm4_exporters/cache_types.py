"""Element types of a KV cache: the activations' type, or a quantized type if the target's attention takes one."""

from glm4_exporters.config import Glm4Config
from glm4_exporters.targets import TARGETS, Target
from glm4_runtime.bundle.element_types import QUANTIZED_CACHES
from glm4_runtime.errors import ExportError

ELEMENT_TYPES = {name: element for element, name in QUANTIZED_CACHES.items()}
KV_CACHES = ("auto", *ELEMENT_TYPES)


def choose_cache(
    config: Glm4Config, task: str, target: Target, activations: str, asked: str = "auto", native: bool = False
) -> str | None:
    """The cache's element type, None for a task without one.

    Args:
        asked: one of ``KV_CACHES``.
        native: whether an engine uses TensorRT's own attention.

    Raises:
        ExportError: this cache is not possible; says why.
    """
    if asked not in KV_CACHES:
        raise ExportError(f"unknown KV cache {asked!r}; it is one of {', '.join(KV_CACHES)}")
    if asked == "auto":
        return activations if task == "causal-lm" else None
    able = [row.name for row in TARGETS.values() if asked in row.caches]
    having = f"target {able[0]} has" if len(able) == 1 else f"targets {' and '.join(able)} have"
    multiple = target.caches[asked].head_multiple if asked in target.caches else 1
    reasons = {
        f"task {task} has no cache": task != "causal-lm",
        f"target {target.name} has no operator with an {asked} cache; {having}": asked not in target.caches,
        f"its operator takes heads of multiples of {multiple} dims, and this model's have {config.head_dim}": (
            config.head_dim % multiple != 0
        ),
        f"TensorRT's own attention takes no {asked} cache, our plugin does": native,
        "it was proved with fp32 and fp16 activations only": activations not in ("float32", "float16"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ExportError(f"the KV cache cannot be {asked}: {reason}; leave --kv-cache out")
    return ELEMENT_TYPES[asked]


def cache_providers(cache: str | None, target: Target, activations: str) -> tuple[str, ...]:
    """ONNX Runtime's providers that have all kernels for this target and element type of the cache."""
    providers, quantized = (
        target.providers[activations],
        target.caches.get(QUANTIZED_CACHES.get(cache or "", "")),
    )
    return (
        providers if quantized is None else tuple(name for name in providers if name in quantized.providers)
    )
