"""The result of a validation as data, for JSON, the terminal, JUnit and the HTML page."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from glm4_deploy.validate.bands import BANDS, Culprit
from glm4_deploy.validate.comparison import Comparison
from glm4_deploy.validate.drift import BlockError
from glm4_deploy.validate.gates import Check, verdict_of
from glm4_deploy.validate.sensitivity import Sensitivity


@dataclass(frozen=True)
class Side:
    """One of the models: the reference, the bundle, or a second bundle."""

    name: str
    path: str
    what: str  # as "ort, int8"
    arithmetic: str  # "as exported", or the type used instead


@dataclass(frozen=True)
class WorstPosition:
    """A position with one of the largest divergences, and the text there."""

    kl: float
    sequence: int
    index: int
    before: str
    follows: str | None  # what the text goes on with
    expected: str  # the reference's best token, and its probability
    expected_probability: float
    actual: str
    actual_probability: float


@dataclass
class Report:
    """Everything that one run of validate measured.

    Attributes:
        comparisons: first the bundle with the reference. With a second bundle: also that one with the reference, and
            both with each other.
        blocks: errors of all sub-blocks; None without ``--layers``.
        unfit_text: whether the reference predicts the text worse than guessing. Then quality is not judged by this
            text.
        at_export: what the gate said when the bundle was made, from its report.json.
        checks: of the gate, for the first comparison.
        losses: with the original of a quantized checkpoint: the losses of its quantization, of the export, and of both.
    """

    reference: Side
    bundle: Side
    against: Side | None
    task: str
    text: str
    tokens: int
    sequences: int
    comparisons: list[Comparison]
    blocks: list[BlockError] | None = None
    out_of_band: list[BlockError] = field(default_factory=list)
    culprit: Culprit | None = None
    unfit_text: bool = False
    at_export: dict[str, Any] | None = None
    gate: str | None = None
    checks: tuple[Check, ...] = ()
    worst: list[WorstPosition] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sensitivity: Sensitivity | None = None
    losses: dict[str, Any] | None = None
    seconds: float = 0.0
    estimated_bytes: int = 0
    peak_rss_bytes: int = 0
    tools: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def verdict(self) -> str:
        if self.gate is None:
            return "not gated"
        return verdict_of(self.checks, not self.unfit_text)

    @property
    def next_step(self) -> str | None:
        """The advice for a verdict that is not good."""
        if self.verdict == "not judged":
            return "Validate again with --text FILE: text like that which the model was trained on."
        if self.verdict != "failed":
            return None
        if self.culprit is not None:
            return (
                f"Start at {self.culprit.error.name}: it is wrong by itself. Export again; where its format is the "
                "cause, give it a wider one by a line in a recipe (export --recipe)."
            )
        if self.blocks is None:
            return "Validate again with --layers: the report then names the first sub-block that is wrong."
        return (
            "Every sub-block computes what its format allows, so the loss is the format's: export with "
            "--calibration FILE, with a recipe by validate --sensitivity, or in a wider --precision."
        )

    def as_dict(self) -> dict[str, Any]:
        """The JSON form; NaN and infinite numbers become None."""
        found = {
            "verdict": self.verdict,
            "next_step": self.next_step,
            "unfit_text": self.unfit_text,
            "at_export": self.at_export,
            "reference": asdict(self.reference),
            "bundle": asdict(self.bundle),
            "against": self.against and asdict(self.against),
            "task": self.task,
            "text": {"source": self.text, "tokens": self.tokens, "sequences": self.sequences},
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
            "losses": self.losses,
            "layers": self.blocks and _layers(self.blocks, self.culprit),
            "gate": self.gate and {"name": self.gate, "checks": [check.as_dict() for check in self.checks]},
            "sensitivity": self.sensitivity and self.sensitivity.as_dict(),
            "worst_positions": [asdict(one) for one in self.worst],
            "notes": self.notes,
            "seconds": self.seconds,
            "estimated_bytes": self.estimated_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "tools": self.tools,
        }
        plain: dict[str, Any] = _plain(found)
        return plain


def _layers(blocks: Sequence[BlockError], culprit: Culprit | None) -> dict[str, Any]:
    return {
        "culprit": culprit and culprit.as_dict(),
        "blocks": [asdict(block) for block in blocks],
        "bands": {name: asdict(BANDS[name]) for name in sorted({block.arithmetic for block in blocks})},
    }


def _plain(value: Any) -> Any:
    """The same data without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
