"""Names of the model's modules that adapters change."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The two halves of the fused matrix, which other tools store and adapt apart: its first rows, then its last.
FUSED, HALVES = "mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")


def canonical(module: str) -> str:
    """The module's name in a causal LM. A bare decoder has no ``model.`` before its modules."""
    return module if module.startswith("model.") or module in ("lm_head", "score") else f"model.{module}"


def fused(module: str) -> tuple[str, int | None]:
    """The fused matrix of a module and the half's index. For any other module: the module and None."""
    half = next((place for place, name in enumerate(HALVES) if module.endswith(f".{name}")), None)
    return module if half is None else module.removesuffix(HALVES[half]) + FUSED, half
