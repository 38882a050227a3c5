"""Element types of a KV cache: the activations' type, or int8 if the target's attention supports it."""

from glm4_exporters.config import Glm4Config
from glm4_exporters.targets import TARGETS, Target
from glm4_runtime.errors import ExportError

KV_CACHES = ("auto", "int8")


def choose_cache(
    config: Glm4Config, task: str, target: Target, activations: str, asked: str = "auto", native: bool = False
) -> str | None:
    """The cache's element type, None for a task without one.

    Args:
        native: whether an engine uses TensorRT's own attention.

    Raises:
        ExportError: int8 is not possible; says why.
    """
    if asked not in KV_CACHES:
        raise ExportError(f"unknown KV cache {asked!r}; it is one of {', '.join(KV_CACHES)}")
    if asked == "auto":
        return activations if task == "causal-lm" else None
    able = " and ".join(row.name for row in TARGETS.values() if row.int8_cache)
    multiple = target.int8_cache.head_multiple if target.int8_cache else 1
    reasons = {
        f"task {task} has no cache": task != "causal-lm",
        f"target {target.name} has no operator with an int8 cache; targets {able} have": (
            target.int8_cache is None
        ),
        f"its operator takes heads of multiples of {multiple} dims, and this model's have {config.head_dim}": (
            config.head_dim % multiple != 0
        ),
        "TensorRT's own attention takes no int8 cache, our plugin does": native,
        "it was proved with fp32 and fp16 activations only": activations not in ("float32", "float16"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ExportError(f"the KV cache cannot be int8: {reason}; leave --kv-cache out")
    return "int8"


def cache_providers(cache: str | None, target: Target, activations: str) -> tuple[str, ...]:
    """ONNX Runtime's providers that have all kernels for this target and cache type."""
    providers = target.providers[activations]
    if cache != "int8" or target.int8_cache is None:
        return providers
    return tuple(name for name in providers if name in target.int8_cache.providers)
