"""glm4-deploy eval BUNDLE [BUNDLE ...]"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glm4_deploy import hub, show
from glm4_runtime.errors import GateError, RequestError
from glm4_runtime.install import install_command

if TYPE_CHECKING:
    from glm4_deploy.evaluate.engines import Engine
    from glm4_deploy.evaluate.gates import LossGate
    from glm4_deploy.evaluate.positions import LongTexts
    from glm4_deploy.evaluate.run import Evaluation
    from glm4_deploy.evaluate.task_list import Selection

FEWEST_WORDS = 14  # of two lines


@click.command("eval")
@click.argument("engines", nargs=-1, required=True, metavar="BUNDLE...")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Also ask the checkpoint, by transformers in float32, and compare with it: a folder, or a name on the hub.",
)
@click.option(
    "--revision", metavar="NAME", help="Branch, tag or commit, if the reference is a name on the hub."
)
@click.option(
    "--tasks",
    default="glm4",
    show_default=True,
    metavar="NAME,...",
    help="Tasks: glm4 (generated items, without a network), glm4_positions (perplexity by position in long texts), names of lm-evaluation-harness, *.yaml files or folders.",
)
@click.option(
    "--items",
    type=click.IntRange(min=2),
    default=200,
    show_default=True,
    metavar="N",
    help="Items per task at most.",
)
@click.option(
    "--words",
    default="200",
    show_default=True,
    metavar="N,...",
    callback=lambda _, __, value: _word_counts(value),
    help="Words in each text of the task glm4_needle; for several numbers, one row of the report each.",
)
@click.option(
    "--people",
    type=click.IntRange(min=1, max=22),
    default=3,
    show_default=True,
    metavar="N",
    help="People in each text of the task glm4_records at most.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Long documents for the task glm4_positions: *.txt, *.jsonl or *.ids. Default: heldout.txt of an engine's folder.",
)
@click.option(
    "--positions",
    type=click.IntRange(min=128),
    metavar="N",
    help="Tokens of a text of the task glm4_positions. Default: the least room of the engines.",
)
@click.option(
    "--shots",
    type=click.IntRange(min=0),
    metavar="N",
    help="Solved examples in each prompt. Default: the task's.",
)
@click.option("--chat", is_flag=True, help="Write the prompts with the chat template.")
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the generated items."
)
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="TEXT",
    help="Fail with exit code 3 on a loss, as 'int8: -0.5 points at p < 0.05' or 'int8/gsm8k: -0.01 nats at p < 0.01'. Repeatable.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("glm4-eval"),
    show_default=True,
    metavar="FOLDER",
    help="Folder for results.json, report.html, junit.xml, and the answers, from which an interrupted run continues.",
)
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of the table.")
def command(
    engines: tuple[str, ...],
    reference: Path | None,
    revision: str | None,
    tasks: str,
    items: int,
    words: tuple[int, ...],
    people: int,
    text: Path | None,
    positions: int | None,
    shots: int | None,
    chat: bool,
    seed: int,
    gates: tuple[str, ...],
    output: Path,
    as_json: bool,
) -> None:
    """Ask each BUNDLE the items of tasks, and say which differences to the first are more than chance.

    BUNDLE is a bundle's folder or a server's address; LABEL=BUNDLE gives it a name.
    """
    show.require_writable(output / "results.json")
    _prepare_harness()
    try:
        import glm4_deploy.evaluate.html  # noqa: F401  its packages are needed after the work
        from glm4_deploy.evaluate.engines import find_engines
        from glm4_deploy.evaluate.positions import long_texts
        from glm4_deploy.evaluate.run import ask_engines, foreseen
        from glm4_deploy.evaluate.task_list import Selection
    except ModuleNotFoundError as error:
        raise RequestError(f"eval needs {error.name}; run {install_command('eval')}") from error
    with show.shown_progress() as progress:
        folder = None if reference is None else hub.local_folder(reference, revision, progress)
    found = find_engines(engines, folder, chat)
    selection = Selection(
        _names(tasks), items, words, people, shots, seed, chat, None if text is None else str(text), positions
    )
    _require_used(selection)
    expected, texts = foreseen(selection), long_texts(found, selection)
    limits = _gates(gates, found, [*expected, *_buckets(texts)])
    for name, (count, least) in expected.items():
        shown = (
            f"a difference of about {100 * least:.1f} points"
            if least <= 1
            else "no difference, there are too few"
        )
        click.echo(f"{name}: {count} items show {shown}", err=True)
    for name, blocks in _buckets(texts).items():
        click.echo(f"{name}: {blocks}", err=True)
    with show.shown_progress() as progress:
        evaluation = ask_engines(found, selection, limits, output, progress, texts)
    _write(evaluation, output)
    _print(evaluation, output, as_json)
    if evaluation.failed:
        raise GateError(f"{len(evaluation.failed)} of {len(evaluation.verdicts)} gates failed")


def _word_counts(value: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(word) for word in value.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < FEWEST_WORDS or len(set(counts)) < len(counts):
        raise click.BadParameter(
            f"{value!r} must be different whole numbers of at least {FEWEST_WORDS}, with commas between."
        )
    return counts


def _require_used(selection: "Selection") -> None:
    if not selection.has_positions and (selection.text is not None or selection.positions is not None):
        raise click.UsageError("--text and --positions are for the task glm4_positions; add it to --tasks.")


def _buckets(texts: "LongTexts | None") -> dict[str, str]:
    """What is known of each bucket of positions before the work."""
    if texts is None:
        return {}
    return {each.task: f"{texts.count(each)} blocks of 64 tokens" for each in texts.buckets}


def _prepare_harness() -> None:
    """Before the harness is imported: no warning of forks, and no key for its client of servers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OPENAI_API_KEY", os.environ.get("GLM4_API_KEY", "none"))


def _names(tasks: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise click.UsageError("--tasks needs at least one name.")
    return names


def _gates(texts: tuple[str, ...], engines: "list[Engine]", tasks: list[str]) -> "list[LossGate]":
    from glm4_deploy.evaluate.gates import parse_gate

    return [parse_gate(text, [each.label for each in engines], tasks) for text in texts]


def _write(evaluation: "Evaluation", output: Path) -> None:
    from glm4_deploy.evaluate.html import eval_page
    from glm4_deploy.evaluate.junit import eval_junit

    results = json.dumps(evaluation.as_dict(), indent=1, ensure_ascii=False)
    files = {
        "results.json": results + "\n",
        "report.html": eval_page(evaluation),
        "junit.xml": eval_junit(evaluation),
    }
    for name, text in files.items():
        with show.writing(output / name) as file:
            file.write_text(text, "utf-8")


def _print(evaluation: "Evaluation", output: Path, as_json: bool) -> None:
    from glm4_deploy.evaluate.table import positions_table, table

    if as_json:
        show.print_json(evaluation.as_dict())
        return
    print(table(evaluation))
    if evaluation.buckets:
        print(positions_table(evaluation))
    for verdict in evaluation.verdicts:
        print(f"{'failed' if verdict.failed else 'passed'}: {verdict.line}")
    for warning in evaluation.warnings:
        print(f"warning: {warning}")
    print(f"report: {output / 'report.html'}")
