"""glm4-deploy bench-serve URL"""

import json
import os
from pathlib import Path
from typing import Any

import click

from glm4_deploy import show
from glm4_deploy.commands.numbers import numbers
from glm4_deploy.commands.text import TEXT_ARGUMENT
from glm4_runtime.errors import RequestError
from glm4_runtime.install import install_command

CLIENTS = "1,2,4,8"


@click.command("bench-serve")
@click.argument("url", type=TEXT_ARGUMENT)
@click.option(
    "--clients",
    metavar="N,...",
    help=f"Numbers of clients; each sends its next request after the answer.  [default: {CLIENTS}]",
)
@click.option(
    "--rate", metavar="R,...", help="Requests per second that arrive at random, instead of --clients."
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Measured requests per load.",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Unmeasured requests before each load.",
)
@click.option(
    "--prompt-words", type=click.IntRange(min=1), default=128, show_default=True, help="Words of each prompt."
)
@click.option(
    "--shared-words",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="First words that all prompts share; shows the prefix cache.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens of each answer."
)
@click.option(
    "--honour-eos", is_flag=True, help="Let answers end early. For servers without the option ignore_eos."
)
@click.option(
    "--timeout",
    type=float,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Maximum time of a request.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of prompts and arrival times.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the results to this file as JSON.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    help="Plot the results to this file: .svg or .png.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(
    url: str,
    clients: str | None,
    rate: str | None,
    honour_eos: bool,
    output: Path | None,
    plot_file: Path | None,
    as_json: bool,
    **load: Any,
) -> None:
    """Measure the server at URL under load; an API key is read from GLM4_API_KEY.

    A load is a number of clients, or a rate of requests.
    """
    if clients is not None and rate is not None:
        raise click.UsageError("--clients and --rate exclude each other; leave one of them out.")
    try:
        from glm4_deploy.load import Load, measure_load, plot
    except ModuleNotFoundError as error:
        raise RequestError(f"bench-serve needs {error.name}; run {install_command('bench')}") from error
    points: list[dict[str, Any]] = (
        [{"rate": value} for value in numbers("--rate", rate, float)]
        if rate is not None
        else [
            {"clients": value} for value in numbers("--clients", CLIENTS if clients is None else clients, int)
        ]
    )
    for wanted in (output, plot_file):
        show.require_writable(wanted)
    loads = [Load(**point, ignore_eos=not honour_eos, **load) for point in points]
    with show.shown_progress() as progress:
        report = measure_load(url, loads, os.environ.get("GLM4_API_KEY"), progress)
    if output is not None:
        with show.writing(output) as file:
            file.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    if plot_file is not None:
        with show.writing(plot_file) as file:
            plot(report, file)
    if as_json:
        show.print_json(report)
    else:
        for run in report["runs"]:
            _print(run)
    if any(run["failed"] for run in report["runs"]):
        raise RequestError("some requests failed; the figures are of the others")


def _print(run: dict[str, Any]) -> None:
    title = f"{run['clients']} clients" if run["loop"] == "closed" else f"{run['rate']:g} requests/s"
    rows = [
        ("requests", f"{run['requests']}, {run['failed']} failed, in {run['seconds']:.1f} s"),
        ("tokens", f"{run['tokens_per_second']:.1f}/s, {run['generated_tokens']} in all"),
        ("prompts", f"{run['prompt_tokens']} tokens, {run['cached_tokens']} from the cache"),
    ]
    for key, name in (
        ("first_token_seconds", "first token"),
        ("inter_token_seconds", "between pieces"),
        ("per_token_seconds", "further tokens"),
        ("request_seconds", "whole request"),
    ):
        if run[key] is not None:
            figures = (f"{label} {1000 * value:.1f}" for label, value in run[key].items())
            rows.append((name, f"{', '.join(figures)} ms"))
    show.print_rows(title, rows + [("error", error) for error in run["errors"]])
