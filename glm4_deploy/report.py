"""``report.json``: the measurements of an export. Only this file of a bundle may depend on the machine or the time."""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm4_deploy.plan import ExportOptions
from glm4_runtime.bundle import REPORT, Manifest

if TYPE_CHECKING:
    from glm4_deploy.engine_bundle import EngineBundle
    from glm4_deploy.export_gate import ExportVerdict
    from glm4_deploy.parity import Parity


@dataclass
class ExportResult:
    bundle: Path
    manifest: Manifest
    parity: "Parity | None"
    gate: "ExportVerdict | None"  # None without parity
    engine: "EngineBundle | None" = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    warnings: list[str] = field(default_factory=list)  # about side files that do not fit each other
    source: Mapping[str, Any] | None = None  # how another tool quantized the checkpoint


class Clock:
    """Measures wall seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - start, 2)


def write_report(folder: Path, options: ExportOptions, result: ExportResult) -> None:
    report: dict[str, Any] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "options": dataclasses.asdict(options),
        "seconds": result.seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "source": result.source or "not quantized",
        "calibration": result.calibration or "nothing was calibrated",
        "parity": "not measured (--no-parity)" if result.parity is None else result.parity.as_dict(),
    }
    if result.warnings:
        report["warnings"] = result.warnings
    if result.gate is not None:
        report["gate"] = result.gate.as_dict()
    if result.engine is not None:
        from glm4_deploy.engine_bundle import engine_report

        report["engine"] = engine_report(result.engine)
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
