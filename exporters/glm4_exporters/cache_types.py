"""What a KV cache may hold: the activations' type, or int8 where a target's attention takes it."""

from glm4_exporters.config import Glm4Config
from glm4_runtime.errors import ExportError

KV_CACHES = ("auto", "int8")
INT8_TARGETS = ("ort", "cpu")
# Those on which an int8 cache was compared with the reference; CUDA's kernel is not among them.
INT8_PROVIDERS = ("CPUExecutionProvider",)
# GroupQueryAttention's; the standard operators, which take any head, have no int8 cache.
HEAD_MULTIPLES = {"ort": 8}


def choose_cache(
    config: Glm4Config, task: str, target: str, activations: str, asked: str = "auto"
) -> str | None:
    """The cache's element type, None for a task without one.

    Raises:
        ExportError: int8 where it cannot be; says why.
    """
    if asked not in KV_CACHES:
        raise ExportError(f"unknown KV cache {asked!r}; it is one of {', '.join(KV_CACHES)}")
    if asked == "auto":
        return activations if task == "causal-lm" else None
    multiple = HEAD_MULTIPLES.get(target, 1)
    reasons = {
        f"task {task} has no cache": task != "causal-lm",
        f"target {target} has no operator with an int8 cache; targets {' and '.join(INT8_TARGETS)} have": (
            target not in INT8_TARGETS
        ),
        f"its operator takes heads of multiples of {multiple} dims, and this model's have {config.head_dim}": (
            config.head_dim % multiple != 0
        ),
        "it was proved with fp32 and fp16 activations only": activations not in ("float32", "float16"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ExportError(f"the KV cache cannot be int8: {reason}; leave --kv-cache out")
    return "int8"


def cache_providers(cache: str | None, providers: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``providers`` that have the kernels for a cache of this type."""
    return tuple(name for name in providers if cache != "int8" or name in INT8_PROVIDERS)
