"""glm4-deploy validate BUNDLE --reference CHECKPOINT"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from glm4_deploy import folders, hub, show
from glm4_deploy.adapters import find_adapters, lora_option
from glm4_deploy.own_text import own_text
from glm4_runtime.errors import GateError, RequestError
from glm4_runtime.install import install_command
from glm4_runtime.progress import Progress

if TYPE_CHECKING:
    from glm4_deploy.validate import Report, ValidateOptions
    from glm4_deploy.validate.comparison import Comparison
    from glm4_deploy.validate.sensitivity import Sensitivity
    from glm4_deploy.validate.statistics import Estimate

RANKED_TOKENS = 1024  # each runs through the model once per matrix
SHOWN = 5  # rows of the ranking to print; --json and the recipe have all


@click.command("validate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    required=True,
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="The checkpoint that BUNDLE was made from: a folder, or a name on the hub.",
)
@click.option(
    "--revision", metavar="NAME", help="Branch, tag or commit, if the reference is a name on the hub."
)
@lora_option
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text to measure on: *.txt, *.jsonl or *.ids. Default: the text that the bundle keeps, heldout.txt of the checkpoint, or a small built-in corpus.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="BUNDLE2|ORIGINAL",
    help="A second bundle of the same checkpoint, or the original of a quantized checkpoint, to compare as well.",
)
@click.option(
    "--layers", is_flag=True, help="Compare every sub-block of every layer, and name the first that is wrong."
)
@click.option(
    "--gate",
    default="default",
    show_default=True,
    metavar="strict|default|loose|FILE.toml",
    help="The limits to pass.",
)
@click.option("--no-gate", is_flag=True, help="Measure without limits.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=4096,
    show_default=True,
    metavar="N",
    help="Maximum tokens of text.",
)
@click.option(
    "--length",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    metavar="N",
    help="Maximum tokens of one sequence.",
)
@click.option("--no-greedy", is_flag=True, help="Do not compare generated texts.")
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory to use at most. Default: the available memory.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write an HTML report with plots, as one file without links.",
)
@click.option(
    "--junit",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the gate's checks as JUnit XML for CI.",
)
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RECIPE.toml",
    help="Rank the matrices by the loss from quantizing each to int4, and write a recipe for export --recipe.",
)
@click.option(
    "--bits",
    type=float,
    metavar="N",
    help="Average bits per weight of the recipe of --sensitivity, scales included. Default: 5.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    bundle: Path,
    reference: Path,
    revision: str | None,
    lora: tuple[str, ...],
    text: Path | None,
    against: Path | None,
    layers: bool,
    gate: str,
    no_gate: bool,
    max_tokens: int,
    length: int,
    no_greedy: bool,
    memory: float | None,
    html: Path | None,
    junit: Path | None,
    sensitivity: Path | None,
    bits: float | None,
    as_json: bool,
) -> None:
    """Measure how far BUNDLE is from its checkpoint, and fail with exit code 3 where a gate's limit is exceeded."""
    _require_options_that_fit(no_gate, junit, bits, sensitivity)
    _require_folders(bundle, against, reference)
    options = _options(
        text=text,
        against=against,
        layers=layers,
        gate=None if no_gate else gate,
        max_tokens=max_tokens,
        length=length,
        greedy=not no_greedy,
        memory=None if memory is None else int(memory * 2**30),
    )
    writers = _writers(html, junit)
    show.require_writable(sensitivity)
    with show.shown_progress() as progress:
        folder = hub.local_folder(reference, revision, progress)
        options = replace(options, adapters=find_adapters(lora, progress))
        report = _measure(bundle, folder, options, progress, sensitivity, bits)
    _write(report, writers)
    if as_json:
        show.print_json(report.as_dict())
    else:
        show.print_rows(f"{bundle} against {reference}", _rows(report))
    _exit_by_the_gate(report)


def _require_options_that_fit(
    no_gate: bool, junit: Path | None, bits: float | None, sensitivity: Path | None
) -> None:
    if no_gate and click.get_current_context().get_parameter_source("gate") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--gate and --no-gate exclude each other; leave one of them out.")
    if no_gate and junit is not None:
        raise click.UsageError("--junit writes the gate's checks, so it does not go with --no-gate.")
    if bits is not None and sensitivity is None:
        raise click.UsageError("--bits needs --sensitivity.")


def _require_folders(bundle: Path, against: Path | None, reference: Path) -> None:
    folders.require_bundle(bundle)
    if against is not None and not folders.is_checkpoint(against):
        folders.require_bundle(against)
    folders.require_checkpoint(reference)


def _options(**given: Any) -> "ValidateOptions":
    try:
        from glm4_deploy.validate import ValidateOptions  # brings torch and onnx
    except ModuleNotFoundError as error:
        raise RequestError(f"validate needs {error.name}; run {install_command('cpu', 'export')}") from error
    return ValidateOptions(**given)


def _writers(html: Path | None, junit: Path | None) -> "dict[Path, Callable[[Report], str]]":
    """What makes each file that is to be written; both are found before the work."""
    writers = {}
    if html is not None:
        writers[html] = _html_writer()
    if junit is not None:
        from glm4_deploy.validate.junit import junit_xml

        writers[junit] = junit_xml
    for path in writers:
        show.require_writable(path)
    return writers


def _measure(
    bundle: Path,
    reference: Path,
    options: "ValidateOptions",
    progress: Progress,
    sensitivity: Path | None,
    bits: float | None,
) -> "Report":
    """The comparison, and then the ranking: what either refuses is refused before the work."""
    from glm4_deploy.validate import validate

    if sensitivity is None:
        return validate(bundle, reference, options, progress)
    from glm4_deploy.validate.sensitivity import mean_bits_of, require_ranking, save_recipe

    mean_bits = mean_bits_of(bits)
    require_ranking(reference)
    report = validate(bundle, reference, options, progress)
    report.sensitivity = _rank(Path(report.bundle.path), reference, options, mean_bits, progress)
    with show.writing(sensitivity) as file:
        save_recipe(file, report.sensitivity)
    return report


def _write(report: "Report", writers: "Mapping[Path, Callable[[Report], str]]") -> None:
    for path, text_of in writers.items():
        with show.writing(path) as file:
            file.write_text(text_of(report), "utf-8")


def _exit_by_the_gate(report: "Report") -> None:
    if not report.failed:
        return
    for check in report.failed:
        click.echo(f"failed: {check.line}", err=True)
    raise GateError(
        f"{report.bundle.path} fails gate {report.gate}: {len(report.failed)} of {len(report.checks)} checks"
    )


def _rank(
    bundle: Path, reference: Path, options: "ValidateOptions", mean_bits: float, progress: Progress
) -> "Sensitivity":
    from glm4_deploy.validate.sensitivity import rank_tensors
    from glm4_exporters.checkpoint import Checkpoint

    with Checkpoint.load(reference, adapters=options.adapters) as checkpoint:
        return rank_tensors(
            checkpoint,
            options.text or own_text(bundle),
            length=options.length,
            max_tokens=min(options.max_tokens, RANKED_TOKENS),
            mean_bits=mean_bits,
            progress=progress,
        )


def _html_writer() -> "Callable[[Report], str]":
    """Imported before the work: the plots need a package that may not be installed."""
    try:
        from glm4_deploy.validate.html import html_page
    except ModuleNotFoundError as error:
        raise RequestError(f"--html needs {error.name}; run {install_command('validate')}") from error
    return html_page


def _rows(report: "Report") -> list[tuple[str, str]]:
    rows = [
        ("bundle", report.bundle.what),
        *([("against", f"{report.against.path}: {report.against.what}")] if report.against else []),
        ("text", f"{report.tokens} tokens in {report.sequences} sequences of {report.text}"),
    ]
    for comparison in report.comparisons:
        if len(report.comparisons) > 1:
            rows.append(("", f"{comparison.actual} compared with {comparison.expected}:"))
        rows += _comparison_rows(comparison)
    if report.losses is not None:
        from glm4_deploy.validate.original import losses_line

        rows.append(("losses", losses_line(report.losses)))
    if report.blocks is not None:
        culprit = report.culprit
        rows.append(
            (
                "layers",
                "every sub-block is in its band"
                if culprit is None
                else f"{culprit.error.name} is the first to leave its band: {culprit.why}",
            )
        )
    if report.sensitivity is not None:
        from glm4_deploy.validate.sensitivity import HIGH, LOW

        found = report.sensitivity
        spared = [loss.name for loss in found.losses if found.recipe.format_of(loss.name) == HIGH]
        rows.append(
            (
                "sensitivity",
                f"{len(spared)} of {len(found.losses)} matrices stay {HIGH} at {found.mean_bits:g} bits per weight",
            )
        )
        rows += [("", f"{loss.name}: KL {loss.kl:.2e} alone in {LOW}") for loss in found.losses[:SHOWN]]
    if report.at_export is not None:
        name, verdict, text = (report.at_export.get(key) for key in ("name", "verdict", "text"))
        rows.append(("at export", f"{name}: {verdict} on {text}"))
    if report.gate is not None:
        rows.append(("gate", f"{report.gate}: {report.verdict}{_left_open(report)}"))
        rows += [("", check.brief) for check in report.checks]
        if report.next_step is not None:
            rows.append(("next step", report.next_step))
    rows += [("note" if place == 0 else "", note) for place, note in enumerate(report.notes)]
    peak, expected = show.readable_size(report.peak_rss_bytes), show.readable_size(report.estimated_bytes)
    rows.append(("took", f"{report.seconds:.1f} s, {peak} at the peak ({expected} foreseen)"))
    return rows


def _left_open(report: "Report") -> str:
    unmeasured = [check.metric for check in report.checks if not check.measured]
    unjudged = [check.metric for check in report.checks if check.measured and not check.judged]
    named = (("not measured", unmeasured), ("not judged", unjudged))
    return "".join(f"; {what}: {', '.join(names)}" for what, names in named if names)


def _comparison_rows(comparison: "Comparison") -> list[tuple[str, str]]:
    metrics, rows = comparison.metrics, []
    if comparison.perplexities is not None and comparison.ratio is not None:
        expected, actual = comparison.perplexities
        rows.append(
            (
                "perplexity",
                f"{actual.value:.4f}, {comparison.expected} {expected.value:.4f}; ratio {_interval(comparison.ratio)}",
            )
        )
    if "kl_mean" in metrics:
        rows.append(
            (
                "KL divergence",
                f"mean {metrics['kl_mean']:.2e}, p99 {metrics['kl_p99']:.2e}, max {metrics['kl_max']:.2e} nats",
            )
        )
        ties = f", {comparison.near_ties} within rounding among them" if comparison.near_ties else ""
        rows.append(
            (
                "agreement",
                f"best token {100 * metrics['top1_agreement']:.2f} %{ties}; best five {100 * metrics['top5_agreement']:.2f} %",
            )
        )
    if comparison.greedy is not None:
        greedy = comparison.greedy
        rows.append(
            (
                "greedy",
                f"the same for {greedy.median:g} of {greedy.tokens} tokens, the median of {len(greedy.common)} prompts",
            )
        )
    if "label_agreement" in metrics:
        rows.append(("labels", f"{100 * metrics['label_agreement']:.2f} % the same"))
    if "cosine" in metrics:
        rows.append(("cosine", f"{metrics['cosine']:.7f}"))
    rows.append(("outputs", f"relative error {metrics['relative_error']:.2e}"))
    return rows


def _interval(estimate: "Estimate") -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.6f} (too few tokens for an interval)"
    return f"{estimate.value:.6f} (95 %: {estimate.low:.6f} ... {estimate.high:.6f})"
