"""Reads typed values of ``config.json``. A wrong value is refused by name."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from glm4_runtime.errors import ConfigError, shown

LARGEST_SIZE, INT64 = 2**31 - 1, 2**63

D = TypeVar("D")


class ConfigValues:
    """Reads typed values of a mapping. A field without a default is required; null counts as absent."""

    def __init__(self, mapping: Mapping[str, Any], owner: str = "") -> None:
        self._mapping, self._owner = mapping, owner

    def integer(self, key: str, *default: D) -> int | D:
        value = self._typed(key, default, (int,), "an integer")
        require_value(
            value is None or -INT64 <= value < INT64,
            f"{self._owner}{key} is {shown(value)}, but must be an integer of 64 bits",
        )
        return cast("int | D", value)

    def number(self, key: str, *default: D) -> float | D:
        value = self._typed(key, default, (int, float), "a number")
        if value is None or (default and value is default[0]):
            return cast("float | D", value)
        try:
            finite = float(value)
        except OverflowError:
            finite = math.inf
        require_value(math.isfinite(finite), f"{self._owner}{key} is {finite}, but must be finite")
        return finite

    def boolean(self, key: str, *default: D) -> bool | D:
        return cast("bool | D", self._typed(key, default, (bool,), "true or false"))

    def text(self, key: str, *default: D) -> str | D:
        return cast("str | D", self._typed(key, default, (str,), "a string"))

    def _typed(self, key: str, default: tuple[object, ...], types: tuple[type, ...], wanted: str) -> Any:
        value = self._mapping.get(key)
        if value is None and default:
            return default[0]
        fits = isinstance(value, types) and isinstance(value, bool) == (bool in types)
        require_value(fits, f"{self._owner}{key} is {shown(value)}, but must be {wanted}")
        return value


def section_of(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object inside the configuration; empty if it is missing or null."""
    value = mapping.get(key)
    require_value(
        value is None or isinstance(value, Mapping),
        f"{key} is {shown(value)}, but must be an object or null",
    )
    return cast(Mapping[str, Any], value or {})


def require_value(condition: bool, message: str) -> None:
    """
    Raises:
        ConfigError: with the message, unless the condition holds.
    """
    if not condition:
        raise ConfigError(message)


def listed(names: Iterable[object]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *most, last = [str(name) for name in names] or [""]
    return f"{', '.join(most)} and {last}" if most else last
