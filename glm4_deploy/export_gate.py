"""The gate at export: the limits and the words of validate, on the few positions that parity compares."""

from dataclasses import dataclass
from typing import Any

from glm4_deploy.parity import Parity
from glm4_deploy.validate.gates import Check, load_gate, verdict_of
from glm4_runtime.bundle import Manifest
from glm4_runtime.errors import GateError

GATE = "default"


@dataclass(frozen=True)
class ExportVerdict:
    """What the gate says of an export.

    Attributes:
        gate: its name and the precision, such as ``default, int8``.
        verdict: ``passed``, ``failed`` or ``not judged``.
        text: what was compared on.
    """

    gate: str
    verdict: str
    text: str
    checks: tuple[Check, ...]

    def as_dict(self) -> dict[str, Any]:
        checks = [check.as_dict() for check in self.checks]
        return {"name": self.gate, "verdict": self.verdict, "text": self.text, "checks": checks}


def judge(parity: Parity, manifest: Manifest) -> ExportVerdict:
    """Hold parity's measurements against the gate of the bundle's precision."""
    gate = load_gate(GATE, manifest)
    found = {
        "kl_mean": parity.mean_kl,
        "top1_agreement": None if parity.top1_agreement is None else parity.agreement,
        "relative_error": parity.relative_error,
        "label_agreement": parity.label_agreement,
    }
    metrics = {name: value for name, value in found.items() if value is not None}
    checks = tuple(
        one for one in gate.check(metrics, parity.fit_text, parity.positions) if one.metric in metrics
    )
    return ExportVerdict(f"{GATE}, {gate.row}", verdict_of(checks, parity.fit_text), parity.text, checks)


def require_passed(found: ExportVerdict) -> None:
    """Refuse to publish what the gate fails.

    Raises:
        GateError: naming each limit that is exceeded.
    """
    failed = [check.line for check in found.checks if not check.passed]
    if failed:
        raise GateError(f"the bundle fails gate {found.gate} on {found.text}: {'; '.join(failed)}")
