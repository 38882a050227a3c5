"""What a step costs by its number of rows: bundles in turn, in one process.

    python -m benchmarks.step_rows out/9b4-int8 out/9b4-int4 --batch 1,4,8,12,16 --out benchmarks/results/step-rows

Each round runs a prompt and steps of every batch with each bundle. Ratios are taken within a round, and the tables have
their medians. The first bundle is opened twice, as "A/A": its ratios to itself are the noise of the run.
"""

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click

from glm4_deploy.bench import Runner
from glm4_plugins.block_product import kernels
from glm4_runtime import Session

AGAIN = "A/A"
PROMPT, CONTEXT = 512, 64  # tokens
Times = Mapping[str, Mapping[str, Sequence[float]]]  # milliseconds of the rounds, by bundle and run


def measure(bundles: Sequence[Path], batches: Sequence[int], steps: int, rounds: int) -> Times:
    names = [*(bundle.name for bundle in bundles), AGAIN]
    sessions = [Session.open(path, max_batch_size=max(batches)) for path in (*bundles, bundles[0])]
    runners = dict(zip(names, map(Runner, sessions), strict=True))
    runs: dict[str, Callable[[Runner], float]] = {f"prompt of {PROMPT}": prompt}
    runs |= {rows_name(batch): partial(decode, batch=batch, steps=steps) for batch in batches}
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in runs} for name in names}
    for done in range(rounds + 1):
        for kind, run in runs.items():
            for name in names if done % 2 else names[::-1]:
                took = run(runners[name])
                if done:
                    times[name][kind].append(round(took * 1e3, 3))
    return times


def prompt(runner: Runner) -> float:
    return runner.prefill(runner.tokens(PROMPT))


def decode(runner: Runner, batch: int, steps: int) -> float:
    """Seconds of a step of a batch: the median of ``steps``, after one that is not counted."""
    runner.fill(runner.tokens(CONTEXT), batch)
    took = [runner.decode(batch, 1) for _ in range(steps + 1)]
    runner.empty()
    return statistics.median(took[1:])


def rows_name(rows: int) -> str:
    return f"{rows} rows"


def ratio(times: Times, above: tuple[str, str], below: tuple[str, str]) -> float:
    """Median of the rounds' ratios of two (bundle, kind)."""
    pairs = zip(times[above[0]][above[1]], times[below[0]][below[1]], strict=True)
    return statistics.median(a / b for a, b in pairs)


def markdown(result: Mapping[str, str], times: Times, than: int) -> str:
    names, kinds = list(times), list(next(iter(times.values())))
    first, base = names[0], rows_name(than)
    tables: list[tuple[str, Callable[[str, str], float]]] = [
        ("Milliseconds, medians", lambda name, kind: statistics.median(times[name][kind])),
        (f"Time over that of {base}", lambda name, kind: ratio(times, (name, kind), (name, base))),
        (f"Speed over that of {first}", lambda name, kind: ratio(times, (first, kind), (name, kind))),
    ]
    lines = [f"# Steps by rows: {', '.join(names[:-1])}\n", f"{result['made'][:10]}, {result['machine']}.\n"]
    lines += [f"    {result['command']}\n"]
    for title, cell in tables:
        lines += [f"{title}:\n", f"| | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
        lines += [f"| {name} | {' | '.join(f'{cell(name, kind):.4g}' for kind in kinds)} |" for name in names]
        lines += [""]
    return "\n".join(lines)


def numbers(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    return [int(number) for number in value.split(",")]


@click.command()
@click.argument("bundles", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--batch", "batches", default="1,4,8", show_default=True, callback=numbers)
@click.option("--than", default=4, show_default=True, help="The batch that others are compared with.")
@click.option("--steps", default=8, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write OUT.json and OUT.md.")
def main(
    bundles: tuple[Path, ...], batches: list[int], than: int, steps: int, rounds: int, out: Path | None
) -> None:
    """Time prompts and steps of BUNDLES by the number of rows."""
    times = measure(bundles, batches, steps, rounds)
    sizes = f"--batch {','.join(map(str, batches))} --than {than} --steps {steps} --rounds {rounds}"
    result = {
        "command": f"python -m benchmarks.step_rows {' '.join(b.name for b in bundles)} {sizes}",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, kernels {kernels()}, "
        f"onnxruntime {version('onnxruntime')}",
    }
    text = markdown(result, times, than)
    click.echo(text)
    if out is not None:
        out.with_suffix(".json").write_text(
            json.dumps({**result, "milliseconds": times}, indent=2) + "\n", "utf-8"
        )
        out.with_suffix(".md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
