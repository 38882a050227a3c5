"""How long a command takes to answer: --help, and generate from the command line to the first token.

    python benchmarks/startup.py --out benchmarks/results/startup

Each in a process of its own, `python -c pass` beside them in every round, since a busy machine slows all alike.
The bundle is the demo checkpoint's, exported with the defaults (int8 for ONNX Runtime) unless one is given. A
token is first when its text reaches the reader of a pipe. Files are in the page cache. Ends with exit code 1 where
a median is above its limit.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
YARDSTICK = "python -c pass"
LIMITS = {"--help": 150.0, "generate, first token": 1000.0}  # milliseconds


def commands(bundle: Path) -> dict[str, list[str]]:
    tool = ["-m", "glm4_deploy"]
    generate = [*tool, "generate", str(bundle), "--stream", "--max-tokens", "8"]
    return {
        YARDSTICK: ["-c", "pass"],
        "--help": [*tool, "--help"],
        "generate --help": [*tool, "generate", "--help"],
        "generate, first token": [*generate, "And it came to pass"],
        "generate --chat, first token": [*generate, "--chat", "Who are you?"],
    }


def milliseconds(arguments: list[str]) -> float:
    """From the start of a process to the first byte that it writes, or to its end where it writes none."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        elapsed = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise click.ClickException(f"{' '.join(arguments)} ended with exit code {process.returncode}")
    return 1e3 * elapsed


def measure(bundle: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Median, least and most of each, and the median of what it takes more than the yardstick in its round."""
    runs = commands(bundle)
    for arguments in runs.values():  # byte code and page cache
        milliseconds(arguments)
    taken = [{name: milliseconds(arguments) for name, arguments in runs.items()} for _ in range(rounds)]
    figures = {}
    for name in runs:
        times = [one[name] for one in taken]
        figures[name] = {
            "median": statistics.median(times),
            "least": min(times),
            "most": max(times),
            "above_yardstick": statistics.median(one[name] - one[YARDSTICK] for one in taken),
        }
    return {name: {key: round(value, 1) for key, value in row.items()} for name, row in figures.items()}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--rounds", type=click.IntRange(min=1), default=21, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json.")
def main(bundle: Path | None, rounds: int, out: Path | None) -> None:
    with ExitStack() as stack:
        if bundle is None:
            bundle = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "demo"
            export = [
                sys.executable,
                "-m",
                "glm4_deploy",
                "export",
                "demo/glm4-tiny",
                str(bundle),
                "--no-parity",
            ]
            subprocess.run(export, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        figures = measure(bundle.absolute(), rounds)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("click", "numpy", "onnxruntime", "tokenizers")},
        "rounds": rounds,
        "limits_milliseconds": LIMITS,
        "milliseconds": figures,
    }
    text = json.dumps(result, indent=2)
    click.echo(text)
    if out is not None:
        out.with_suffix(".json").write_text(text + "\n")
    slow = [name for name, limit in LIMITS.items() if figures[name]["median"] > limit]
    if slow:
        raise click.ClickException(f"slower than its limit: {', '.join(slow)}")


if __name__ == "__main__":
    main()
