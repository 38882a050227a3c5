"""Reads the limits in thresholds.toml and derives the remaining ones. Needs no torch.

Examples: PARITY["int8"]["mean_kl"], BAND_LIMITS["int8"]["local"], GPU_CHECK["float16"],
named_gate("strict")["int8+kv-int8"]["kl_mean"].
"""

import tomllib
from collections.abc import Mapping
from importlib.resources import files

Row = Mapping[str, float]

_ALL = tomllib.loads(files(__package__).joinpath("thresholds.toml").read_text("utf-8"))
_DERIVED: Row = _ALL["derived"]
_CACHES: Mapping[str, Row] = _ALL["cache"]

PARITY: Mapping[str, Row] = _ALL["parity"]
BAND_LIMITS: Mapping[str, Row] = _ALL["band"]
GPU_CHECK: Row = _ALL["gpu_check"]
PARITY_CACHE = {name: (row["parity_kl"], row["parity_top1"]) for name, row in _CACHES.items()}

GATED_PRECISIONS = tuple(_ALL["gate"])
CACHE_SUFFIXES = {name: f"+kv-{name}" for name in _CACHES}
GATES = ("strict", "default", "loose")

# The value of each metric for a bundle that equals the reference.
PERFECT = {
    "perplexity_ratio": 1.0,
    "kl_mean": 0.0,
    "kl_p99": 0.0,
    "kl_max": 0.0,
    "top1_agreement": 1.0,
    "top5_agreement": 1.0,
    "relative_error": 0.0,
    "label_agreement": 1.0,
    "cosine": 1.0,
}


def named_gate(name: str) -> dict[str, dict[str, float]]:
    """The limits of a gate in ``GATES``, by precision and metric. ``CACHE_SUFFIXES`` mark rows with a quantized KV
    cache."""
    plain = {precision: dict(_ALL["gate"][precision]) for precision in GATED_PRECISIONS}
    cached = {
        precision + CACHE_SUFFIXES[cache]: _with_cache(row, changes)
        for cache, changes in _CACHES.items()
        for precision, row in plain.items()
    }
    return {precision: _complete(name, row) for precision, row in (plain | cached).items()}


def _with_cache(row: Row, changes: Row) -> dict[str, float]:
    def limit(metric: str, value: float) -> float:
        change = changes[metric]
        if metric == "greedy_prefix":
            return min(value, change)
        return value - change if _is_agreement(metric) else value + change

    return {metric: round(limit(metric, value), 12) for metric, value in row.items()}


def _complete(name: str, row: Row) -> dict[str, float]:
    """The limits of a named gate, from the row of "default": the loss is scaled, and derived metrics are added."""
    row = {**row, "kl_p99": 10 * row["kl_mean"]}
    share, greedy = _DERIVED.get(name, 1.0), _DERIVED.get(f"greedy_{name}", 1.0)
    limits = {
        metric: round(PERFECT[metric] + share * (row[metric] - PERFECT[metric]), 12) for metric in PERFECT
    }
    return limits | {"greedy_prefix": min(1.0, greedy * row["greedy_prefix"]), "blocks_out_of_band": 0.0}


def _is_agreement(metric: str) -> bool:
    """Whether a higher value of the metric is better."""
    return metric.endswith("agreement") or metric in ("cosine", "greedy_prefix")
