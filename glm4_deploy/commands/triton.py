"""glm4-deploy triton BUNDLE REPOSITORY"""

from pathlib import Path

import click

from glm4_deploy import folders, show


@click.command("triton")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Name of the model in Triton. Default: the bundle's.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of threads. Default: all cores.")
@click.option(
    "--max-seq-len",
    type=click.IntRange(min=1),
    metavar="N",
    help="Maximum tokens of a sequence, at most the bundle's limit.",
)
@click.option(
    "--max-batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Maximum number of sequences, at most the bundle's limit.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=1),
    metavar="N",
    help="Maximum number of requests that wait for a slot. Default: 64.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    bundle: Path, repository: Path, name: str | None, as_json: bool, **parameters: int | None
) -> None:
    """Write a model repository for Triton Inference Server into REPOSITORY, with BUNDLE as its model."""
    folders.require_bundle(bundle)
    from glm4_deploy.triton_repository import write_repository

    given = {key: str(value) for key, value in parameters.items() if value is not None}
    folder = write_repository(bundle, repository, name, given)
    start = f"tritonserver --model-repository {repository}"
    if as_json:
        show.print_json({"model": str(folder), "start": start})
    else:
        show.print_rows(f"{folder}", [("start", start)])
