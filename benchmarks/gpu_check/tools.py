"""NVIDIA's own tools on single cases, each in a process of its own: compute-sanitizer and Nsight Compute."""

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

KERNEL = "partial_rope_gqa_attention"
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block_dynamic",
    "smsp__inst_executed_op_local_st.sum",
)
LONGEST = 90  # seconds of one run

Runner = Callable[..., "subprocess.CompletedProcess[str]"]


def one_case(name: str) -> list[str]:
    """The command that runs one correctness case, with one launch."""
    return [sys.executable, "-m", "benchmarks.gpu_check", "--case", name]


def sanitized(tool: str, case: str, left: float, run: Runner = subprocess.run) -> dict[str, Any]:
    """compute-sanitizer's verdict on a case.

    Args:
        tool: ``memcheck``, ``racecheck``, ``synccheck`` or ``initcheck``.
        left: seconds until the deadline.

    Raises:
        RuntimeError: the tool is missing, took too long, or gave no verdict.
    """
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", f"kernel_substring={KERNEL}"]
    said = _said([*command, *one_case(case)], left, run)
    found = re.search(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)", said)
    if found is None:
        raise RuntimeError(f"compute-sanitizer gave no summary: {said.strip().splitlines()[-1:]}")
    errors = int(found[1] or found[2] or 0)
    first = next(
        (line for line in said.splitlines() if re.match(r"=+ (Invalid|Error|Warning|Race)", line)), ""
    )
    return dict(tool=tool, case=case, errors=errors, first=first.strip("= "), ok=errors == 0)


def profiled(case: str, left: float, run: Runner = subprocess.run) -> dict[str, Any]:
    """Nsight Compute's metrics of the kernel's last launch in a case.

    Raises:
        RuntimeError: the tool is missing, took too long, or saw no launch.
    """
    command = ["ncu", "--csv", "--metrics", ",".join(METRICS), "--kernel-name", f"regex:{KERNEL}"]
    metrics = parse_ncu(_said([*command, *one_case(case)], left, run))
    if not metrics:
        raise RuntimeError("ncu saw no launch of the kernel; it may lack the right to read counters")
    return dict(case=case, metrics=metrics)


def parse_ncu(said: str) -> dict[str, str]:
    """Values with their units, of the last launch, by the metric's name."""
    lines = said.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    found: dict[str, str] = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name") in METRICS:
            found[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return found


def _said(command: Sequence[str], left: float, run: Runner) -> str:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not installed")
    seconds = min(left, LONGEST)
    try:
        done = run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} took more than {seconds:.0f} s") from None
    return done.stdout + done.stderr
