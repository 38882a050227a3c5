"""glm4-deploy bench BUNDLE"""

from pathlib import Path
from typing import Any

import click

from glm4_deploy import folders, show
from glm4_deploy.adapters import run_time_lora_option
from glm4_deploy.commands.numbers import numbers


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prefill",
    default="512,2048",
    show_default=True,
    metavar="N,...",
    help="Lengths of the prompts, in tokens.",
)
@click.option(
    "--batch",
    default="1,4,8",
    show_default=True,
    metavar="N,...",
    help="Numbers of sequences that decode together.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens in the cache of each sequence before it decodes.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Tokens that each sequence decodes.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Measured rounds, after one that is not counted.",
)
@run_time_lora_option
@click.option("--threads", type=click.IntRange(min=1), help="Number of threads. Default: all cores.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(bundle: Path, prefill: str, batch: str, as_json: bool, **how: Any) -> None:
    """Measure BUNDLE on this machine: loading, prompts, decoding and memory."""
    folders.require_bundle(bundle)
    from glm4_deploy.bench import BenchOptions, bench

    prompts, batches = numbers("--prefill", prefill, int), numbers("--batch", batch, int)
    with show.shown_progress() as progress:
        report = bench(bundle, BenchOptions(prompts, batches, **how), progress)
    if as_json:
        show.print_json(report)
    else:
        show.print_rows(f"{bundle}: {report['precision']} for {report['target']}", _rows(report))


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("runs on", f"{report['provider']}, {report['threads'] or 'all'} threads"),
        *([("adapter", report["lora"])] if report["lora"] else []),
        ("load", f"{report['load_seconds']:.2f} s"),
    ]
    rows += [(f"prefill {n}", _rate(figures)) for n, figures in report["prefill"].items()]
    rows += [
        (f"decode, batch {n}", f"{_rate(figures)} after {report['context']}")
        for n, figures in report["decode"].items()
    ]
    return [
        *rows,
        ("weights", show.readable_size(report["weight_bytes"])),
        ("peak memory", show.readable_size(report["peak_bytes"])),
    ]


def _rate(figures: dict[str, float]) -> str:
    return f"{figures['median']:.1f} tokens/s ({figures['min']:.1f} ... {figures['max']:.1f})"
