"""Gates: the limits that a bundle must pass, per precision. thresholds.toml has the named ones; a user's is a TOML
file.

extends = "default"          # optional: what the file doesn't say is as there
[int8]
perplexity_ratio = 1.001
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm4_deploy.thresholds import CACHE_SUFFIXES, GATES, named_gate
from glm4_exporters.targets import PRECISIONS
from glm4_runtime.bundle import Manifest
from glm4_runtime.bundle.element_types import QUANTIZED_CACHES
from glm4_runtime.errors import RequestError

TEXT, LABELS, STATES = ("causal-lm",), ("sequence-classification", "token-classification"), ("encoder",)


@dataclass(frozen=True)
class Metric:
    """A metric that a gate can limit, from above, or from below with ``at_least``. ``tasks``: the tasks that have it."""

    says: str
    tasks: tuple[str, ...]
    at_least: bool = False
    needs_fit_text: bool = False  # meaningless if the reference only guesses


METRICS = {
    "perplexity_ratio": Metric(
        "bundle's perplexity over the reference's; below 1 is chance and no gain", TEXT, needs_fit_text=True
    ),
    "kl_mean": Metric("mean KL divergence, nats", TEXT, needs_fit_text=True),
    "kl_p99": Metric("99th percentile of the KL divergence, nats", TEXT, needs_fit_text=True),
    "kl_max": Metric("largest KL divergence, nats", TEXT, needs_fit_text=True),
    "top1_agreement": Metric(
        "share of positions with the same best token, or one within rounding", TEXT, True, True
    ),
    "top5_agreement": Metric("share of the five best tokens that both have", TEXT, True, True),
    "greedy_prefix": Metric(
        "median share of a greedy text that is the same from its start", TEXT, True, True
    ),
    "relative_error": Metric("error of the outputs, relative to their size", TEXT + LABELS + STATES),
    "label_agreement": Metric("share of the same labels", LABELS, True, True),
    "cosine": Metric("cosine of the hidden states", STATES, True),
    "blocks_out_of_band": Metric(
        "sub-blocks outside the band of their arithmetic, with --layers", TEXT + LABELS + STATES
    ),
}
SHARES = ("top1_agreement", "label_agreement")  # of positions
PRECISION_ROWS = tuple(name + suffix for name in PRECISIONS for suffix in ("", *CACHE_SUFFIXES.values()))
NAMES = GATES

Table = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Check:
    """One limit with its measurement.

    Attributes:
        value: None if the metric was not measured.
        judged: False if the text is unfit for this metric.
    """

    metric: str
    value: float | None
    limit: float
    judged: bool = True

    @property
    def measured(self) -> bool:
        return self.value is not None

    @property
    def passed(self) -> bool:
        """A metric that was not measured or not judged does not fail, unless it is NaN; the report says so."""
        if self.value is None:
            return True
        if not math.isfinite(self.value):
            return False
        if not self.judged:
            return True
        return self.value >= self.limit if METRICS[self.metric].at_least else self.value <= self.limit

    @property
    def brief(self) -> str:
        """For a table."""
        return f"{self.metric} {self._found} ({self._wanted})"

    @property
    def line(self) -> str:
        return f"{self.metric} is {self._found}, must be {self._wanted} ({METRICS[self.metric].says})"

    @property
    def _found(self) -> str:
        return "not measured" if self.value is None else f"{self.value:.6g}"

    @property
    def _wanted(self) -> str:
        return f"{'at least' if METRICS[self.metric].at_least else 'at most'} {self.limit:g}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed, "measured": self.measured}


@dataclass(frozen=True)
class Gate:
    """The limits for one bundle.

    Attributes:
        name: name of the gate, or the path of a user's file.
        row: the precision of these limits.
    """

    name: str
    row: str
    limits: Mapping[str, float]

    def check(
        self, metrics: Mapping[str, float], fit_text: bool = True, positions: int | None = None
    ) -> tuple[Check, ...]:
        """Compare each limit with its measurement.

        Args:
            fit_text: False if the reference predicts the text worse than guessing.
            positions: number of positions. A share that misses its limit by less than two standard deviations may do so
                by chance, and is not judged.
        """
        return tuple(
            Check(name, metrics.get(name), limit, self._judges(name, metrics, fit_text, positions))
            for name, limit in self.limits.items()
        )

    def _judges(self, name: str, metrics: Mapping[str, float], fit_text: bool, positions: int | None) -> bool:
        value, limit = metrics.get(name), self.limits[name]
        if positions is not None and value is not None and name in SHARES and value < limit:
            chance = 2 * math.sqrt(max(limit * (1 - limit), 0.0) / positions)
            if value >= limit - chance:
                return False
        return fit_text or not METRICS[name].needs_fit_text


def verdict_of(checks: Sequence[Check], fit_text: bool) -> str:
    """``failed``, ``not judged`` where the text is unfit, or ``passed``."""
    if not all(check.passed for check in checks):
        return "failed"
    return "passed" if fit_text else "not judged"


def row_of(manifest: Manifest) -> str:
    """The name of a bundle's precision in gates."""
    return manifest.precision + CACHE_SUFFIXES.get(QUANTIZED_CACHES.get(str(manifest.kv_cache), ""), "")


def load_gate(name: str, manifest: Manifest) -> Gate:
    """A gate's limits for a bundle; a gate may also limit metrics of other tasks.

    Args:
        name: ``strict``, ``default``, ``loose`` or the path of a TOML file.

    Raises:
        RequestError: no such gate, or one that names what is not known, or has no limit for the bundle.
    """
    row, table = row_of(manifest), _load_table(name)
    if row not in table:
        raise RequestError(
            f"gate {name} has no limits for {row}; it has {', '.join(table) or 'none'}. Add [{_key(row)}] to it"
        )
    limits = {name: limit for name, limit in table[row].items() if manifest.task in METRICS[name].tasks}
    if not limits:
        raise RequestError(
            f"gate {name} has no limit for a metric of a {manifest.task} bundle; add a limit to "
            f"[{_key(row)}], or add --no-gate"
        )
    return Gate(name, row, limits)


def _load_table(name: str) -> Table:
    if name in NAMES:
        return named_gate(name)
    path = Path(name)
    if path.suffix != ".toml":
        raise RequestError(f"there is no gate {name!r}; the gates are {', '.join(NAMES)}, or a file *.toml")
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(f"gate {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"gate {path} is not TOML: {error}") from error
    base = table.pop("extends", None)
    if base is not None and base not in NAMES:
        raise RequestError(f"gate {path} extends {base!r}; it can extend {', '.join(NAMES)}")
    own = {row: _checked_row(path, row, limits) for row, limits in table.items()}
    inherited = {} if base is None else _load_table(base)
    rows = [row for row in PRECISION_ROWS if row in inherited or row in own]
    return {row: {**inherited.get(row, {}), **own.get(row, {})} for row in rows}


def _checked_row(path: Path, row: str, limits: Any) -> dict[str, float]:
    if row not in PRECISION_ROWS:
        raise RequestError(
            f"gate {path} has limits for {row!r}; the precisions are {', '.join(PRECISION_ROWS)}"
        )
    if not isinstance(limits, dict):
        raise RequestError(f"gate {path}: {row} must be a table of metrics, as [{_key(row)}]")
    for metric, limit in limits.items():
        if metric not in METRICS:
            raise RequestError(f"gate {path} limits {metric!r}; the metrics are {', '.join(METRICS)}")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            raise RequestError(f"gate {path}: {row} {metric} is {limit!r}, but must be a number")
    return {metric: float(limit) for metric, limit in limits.items()}


def _key(row: str) -> str:
    return f'"{row}"' if "+" in row else row
