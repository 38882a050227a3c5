"""The rotary embedding's parameters, read from any form of ``config.json``."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from glm4_exporters.config_values import LARGEST_SIZE, ConfigValues, listed, require_value, section_of
from glm4_runtime.errors import shown

DEFAULT_THETA, DEFAULT_PARTIAL_ROTARY_FACTOR = 10000.0, 0.5
COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
YARN_KEYS = {
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
}


@dataclass(frozen=True)
class RopeParameters:
    """Parameters of the rotary embedding. The fields after ``rope_type`` are used only with ``yarn``.

    With ``yarn``, ``factor`` and ``original_max_position_embeddings`` are never None.
    """

    theta: float = DEFAULT_THETA
    partial_rotary_factor: float = DEFAULT_PARTIAL_ROTARY_FACTOR
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        require_value(self.theta > 1, f"rope_theta is {self.theta}, but must be greater than 1")
        require_value(
            0 < self.partial_rotary_factor <= 1,
            f"partial_rotary_factor is {self.partial_rotary_factor}, but must be above 0 and at most 1",
        )
        if self.rope_type == "default":
            return
        require_value(
            self.rope_type == "yarn",
            f"rope_type {self.rope_type!r} is not supported; GLM-4-0414 knows 'default' and 'yarn'",
        )
        require_value(
            self.factor is not None and self.factor >= 1,
            f"yarn's factor is {self.factor}, but must be at least 1: the wanted context / the original one",
        )
        original = self.original_max_position_embeddings
        require_value(
            original is not None and 0 < original <= LARGEST_SIZE,
            f"yarn's original_max_position_embeddings is {original}, but must be 1 ... {LARGEST_SIZE}",
        )
        _require_range(
            "attention_factor", self.attention_factor, 1e-3, 1e3, " (or absent: it follows from factor)"
        )
        for name in ("mscale", "mscale_all_dim"):
            _require_range(name, getattr(self, name), 0, 1e3)
        for name in ("beta_fast", "beta_slow"):
            _require_range(name, getattr(self, name), 1e-3, 1e6)
        require_value(
            self.beta_fast >= self.beta_slow,
            f"yarn's beta_fast {self.beta_fast} is below beta_slow {self.beta_slow}; the fast one must be the larger",
        )

    @property
    def positions(self) -> float:
        """With ``yarn``, factor * original positions, else 0. Rounded to 3 digits, because factor may be a rounded
        ratio."""
        return round((self.factor or 0.0) * (self.original_max_position_embeddings or 0), 3)

    def to_dict(self) -> dict[str, Any]:
        """``rope_parameters`` of transformers 5, sorted, with every value of the type that is not None."""
        values: dict[str, Any] = {
            "rope_type": self.rope_type,
            "rope_theta": self.theta,
            "partial_rotary_factor": self.partial_rotary_factor,
        }
        if self.rope_type == "yarn":
            values |= {key: getattr(self, key) for key in YARN_KEYS if getattr(self, key) is not None}
        return dict(sorted(values.items()))


def _require_range(name: str, value: float | None, low: float, high: float, hint: str = "") -> None:
    """Values far from any model's, whose angles overflow."""
    require_value(
        value is None or low <= value <= high,
        f"yarn's {name} is {value}, but must be {low:g} ... {high:g}{hint}",
    )


def rope_parameters(mapping: Mapping[str, Any], positions: int) -> RopeParameters:
    """Read the top-level keys and ``rope_scaling`` of transformers 4, or ``rope_parameters`` of transformers 5.

    Args:
        mapping: the contents of ``config.json``.
        positions: ``max_position_embeddings``.

    Raises:
        ConfigError: a value is impossible, said twice, or not used by the type.
    """
    scaling, parameters = section_of(mapping, "rope_scaling"), section_of(mapping, "rope_parameters")
    if scaling and parameters:
        _require_equal(scaling, parameters)
        # transformers reads these from rope_scaling, the top level or its defaults, so all sources must agree.
        mapping = {
            "rope_theta": DEFAULT_THETA,
            "partial_rotary_factor": DEFAULT_PARTIAL_ROTARY_FACTOR,
        } | dict(mapping)
    section, rope = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)
    values = ConfigValues(rope, f"{section}.")
    sources = [values, ConfigValues(parameters, "rope_parameters."), ConfigValues(mapping)]
    theta = _agreed(sources, "rope_theta", DEFAULT_THETA)
    partial = _agreed(sources, "partial_rotary_factor", DEFAULT_PARTIAL_ROTARY_FACTOR)
    rope_type = _rope_type(rope, section)
    if rope_type == "yarn":
        _require_used(rope, section, YARN_KEYS, "which yarn does not use")
        require_value(
            "factor" in rope, f"{section} says yarn without a factor; the model cards recommend 4.0"
        )
        return _yarn(theta, partial, values, _original_positions(mapping, values, positions), positions)
    plain = RopeParameters(theta, partial, rope_type)
    advice = "which rope_type 'default' does not use; remove it, or set rope_type to 'yarn'"
    _require_used(rope, section, set(), advice)
    return plain


def _yarn(
    theta: float, partial: float, values: ConfigValues, original: int, positions: int
) -> RopeParameters:
    factor = values.number("factor", None)
    return RopeParameters(
        theta=theta,
        partial_rotary_factor=partial,
        rope_type="yarn",
        factor=positions / original if factor is None else factor,
        original_max_position_embeddings=original,
        attention_factor=values.number("attention_factor", None),
        beta_fast=values.number("beta_fast", 32.0),
        beta_slow=values.number("beta_slow", 1.0),
        mscale=values.number("mscale", None),
        mscale_all_dim=values.number("mscale_all_dim", None),
        truncate=values.boolean("truncate", True),
    )


def _require_equal(scaling: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuse both forms at once, unless they are equal or the second says only the default type."""
    require_value(
        _rope_type(parameters, "rope_parameters") == "default" or parameters == scaling,
        "rope_scaling and rope_parameters are both there and differ; keep rope_parameters alone",
    )


def _agreed(sources: Iterable[ConfigValues], key: str, default: float) -> float:
    """The value of a key in all sources that have the key."""
    said = {value for source in sources if (value := source.number(key, None)) is not None}
    require_value(len(said) <= 1, f"{key} is said twice, as {listed(sorted(said))}; keep one of them")
    return said.pop() if said else default


def _original_positions(mapping: Mapping[str, Any], values: ConfigValues, positions: int) -> int:
    """Positions of the model before yarn, as in transformers: from the top level, the section or the positions."""
    key = "original_max_position_embeddings"
    original = ConfigValues(mapping).integer(key, values.integer(key, positions))
    require_value(original > 0, f"yarn's {key} is {original}, but must be 1 ... {LARGEST_SIZE}")
    return original


def _require_used(rope: Mapping[str, Any], section: str, used: Collection[str], refusal: str) -> None:
    """Refuse keys that are neither common to all types nor in ``used``."""
    extra = {key for key, value in rope.items() if value is not None} - COMMON_KEYS
    require_value(extra <= set(used), f"{section} holds {listed(sorted(extra - set(used)))}, {refusal}")


def _rope_type(rope: Mapping[str, Any], section: str) -> str:
    said = {shown(rope[key]): rope[key] for key in ("rope_type", "type") if rope.get(key) is not None}
    require_value(len(said) <= 1, f"{section} says two types, {listed(said)}; keep rope_type alone")
    return str(next(iter(said.values()), "default"))
