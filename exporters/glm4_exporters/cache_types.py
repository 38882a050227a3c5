"""Types of a KV cache: the activations' type, or another type that the target's attention takes."""

from glm4_exporters.config import Glm4Config
from glm4_exporters.targets import ACTIVATIONS, TARGETS, Target
from glm4_runtime.bundle.element_types import CACHE_TYPES
from glm4_runtime.errors import ExportError

KV_CACHES = ("auto", *dict.fromkeys(each.short for each in CACHE_TYPES.values()))


def choose_cache(
    config: Glm4Config, task: str, target: Target, activations: str, asked: str = "auto", native: bool = False
) -> str | None:
    """The cache's name in ``CACHE_TYPES``, None for a task without one.

    Args:
        asked: one of ``KV_CACHES``.
        native: whether an engine uses TensorRT's own attention.

    Raises:
        ExportError: this cache is not possible; says why.
    """
    if asked not in KV_CACHES:
        raise ExportError(f"unknown KV cache {asked!r}; it is one of {', '.join(KV_CACHES)}")
    if asked == "auto":
        if task != "causal-lm":
            return None
        return activations if target.default_cache is None else target.caches[target.default_cache].stored
    own, other = ACTIVATIONS.get(asked) == activations, target.caches.get(asked)
    multiple = other.head_multiple if other is not None else 1
    reasons = {
        f"task {task} has no cache": task != "causal-lm",
        f"target {target.name} has no operator with an {asked} cache{_who_has(asked)}": other is None
        and not own,
        f"its operator takes heads of multiples of {multiple} dims, and this model's have {config.head_dim}": (
            config.head_dim % multiple != 0
        ),
        f"TensorRT's own attention takes no {asked} cache, our plugin does": native and not own,
        "it was proved with fp32 and fp16 activations only": not own
        and activations not in ("float32", "float16"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ExportError(f"the KV cache cannot be {asked}: {reason}; leave --kv-cache out")
    return activations if own or other is None else other.stored


def _who_has(asked: str) -> str:
    able = [row.name for row in TARGETS.values() if asked in row.caches]
    if asked in ACTIVATIONS:
        return f"; other targets than {' and '.join(able) or 'cpu'} have the type of --activations"
    return f"; target{'s' * (len(able) > 1)} {' and '.join(able)} {'have' if len(able) > 1 else 'has'}"


def cache_providers(cache: str | None, target: Target, activations: str) -> tuple[str, ...]:
    """ONNX Runtime's providers that have all kernels for this target and type of the cache."""
    providers = target.providers[activations]
    other = next((row for row in target.caches.values() if row.stored == cache), None)
    return providers if other is None else tuple(name for name in providers if name in other.providers)
