"""What an export costs: peak memory, and wall time against copying the same checkpoint.

    python benchmarks/make_checkpoint.py --size 9b /data/9b
    python benchmarks/export_cost.py /data/9b /data/work --out benchmarks/results/export-9b

Each round copies the checkpoint (``cp --reflink=never`` and ``sync``), then exports it in each precision,
with the page cache dropped before each (as root). The ratio is that of the medians, the trace left out:
it takes seconds and does not grow with the weights. ``--kept QUANTIZED`` exports this checkpoint as well, without a
precision (make_awq.py makes one). Peak memory is the kernel's own figure for the
process ("Maximum resident set size" of ``/usr/bin/time -v``), mapped pages counted.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click

KEPT = "kept"  # the numbers of a quantized checkpoint


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def copy_seconds(source: Path, target: Path) -> float:
    drop_caches()
    start = time.monotonic()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    os.sync()
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def export_once(source: Path, target: Path, precision: str, kind: str) -> dict[str, float]:
    """Export in a process of its own; wall seconds, those of the trace, and peak bytes."""
    drop_caches()
    program = Path(sys.executable).with_name("glm4-deploy")
    command = [
        program,
        "export",
        source,
        target,
        *("--target", kind),
        *(("--precision", precision) if precision != KEPT else ()),
        "--no-parity",
        "--json",
    ]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        raise click.ClickException(f"the export failed with status {status}")
    written = json.loads(output)
    shutil.rmtree(target)
    return {
        "seconds": seconds,
        "trace_seconds": written["seconds"]["trace"],
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("work", type=click.Path(path_type=Path))
@click.option(
    "--kept",
    type=click.Path(path_type=Path, exists=True),
    help="A quantized checkpoint to export as it is, too.",
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--precision", "precisions", multiple=True, default=("bf16", "fp16"), show_default=True)
@click.option("--target", "kind", default="ort", show_default=True)
@click.option("--copy/--no-copy", default=True, help="Compare with a copy.", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json and OUT.md.")
def main(
    checkpoint: Path,
    work: Path,
    kept: Path | None,
    rounds: int,
    precisions: tuple[str, ...],
    kind: str,
    copy: bool,
    out: Path | None,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    copies, exports = [], {precision: [] for precision in (*precisions, *([KEPT] if kept else []))}
    for number in range(rounds):
        click.echo(f"round {number + 1} of {rounds}", err=True)
        if copy:
            copies.append(copy_seconds(checkpoint, work / "copy"))
        for precision, runs in exports.items():
            source = kept if kept is not None and precision == KEPT else checkpoint
            runs.append(export_once(source, work / "bundle", precision, kind))
    size = sum(path.stat().st_size for path in checkpoint.iterdir() if path.is_file())
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(
            [f"python benchmarks/export_cost.py CHECKPOINT WORK --rounds {rounds} --target {kind}"]
            + ["--no-copy"] * (not copy)
            + ["--kept QUANTIZED"] * (kept is not None)
            + [f"--precision {precision}" for precision in precisions]
        ),
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in ("torch", "onnx", "onnx-ir")},
        "checkpoint": {"name": checkpoint.name, "bytes": size},
        "copy_seconds": copies,
        "exports": exports,
    }
    lines = table(result)
    click.echo("\n".join(lines))
    if out is not None:
        out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def table(result: dict) -> list[str]:
    machine, copies = result["machine"], result["copy_seconds"]
    lines = [
        f"# Export of {result['checkpoint']['name']} ({result['checkpoint']['bytes'] / 1e9:.1f} GB)",
        "",
        f"{result['date']}, {machine['cpus']} cores, Python {machine['python']}, "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        "",
        f"Command: `{result['command']}`. Cold page cache before each run; medians, all runs in brackets.",
        "",
        "| what | seconds | without the trace | ratio to copying | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    if copies:
        lines.append(f"| cp --reflink=never and sync | {shown(copies)} | | 1 | |")
    for precision, runs in result["exports"].items():
        net = [run["seconds"] - run["trace_seconds"] for run in runs]
        ratio = f"{statistics.median(net) / statistics.median(copies):.2f}" if copies else ""
        peak = max(run["peak_rss_bytes"] for run in runs) / 2**20
        lines.append(
            f"| export {precision} | {shown([run['seconds'] for run in runs])} | {shown(net)} | {ratio} | {peak:.0f} |"
        )
    return lines


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


if __name__ == "__main__":
    main()
