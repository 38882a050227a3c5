"""Validate: runs the reference and the bundles side by side, layer by layer, and compares them."""

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glm4_deploy.folders import is_checkpoint
from glm4_deploy.memory import available_memory
from glm4_deploy.own_text import own_text
from glm4_deploy.validate.bands import find_culprit, is_out_of_band
from glm4_deploy.validate.comparison import NO_TARGET, Comparison, worst_positions
from glm4_deploy.validate.drift import BlockError
from glm4_deploy.validate.gates import Gate, load_gate, row_of
from glm4_deploy.validate.greedy import add_greedy
from glm4_deploy.validate.memory import Work, require_memory
from glm4_deploy.validate.original import losses, open_original, original_comparisons
from glm4_deploy.validate.report import Report, Side, WorstPosition
from glm4_deploy.validate.side_by_side import Bundle, Models, Walked, walk
from glm4_deploy.validate.text import Text, choose_text, hex_of_bytes
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.peak_memory import peak_memory
from glm4_runtime.bundle import REPORT, read_manifest
from glm4_runtime.bundle.json_file import read_object
from glm4_runtime.errors import BundleError, RequestError
from glm4_runtime.opening import check_opening
from glm4_runtime.progress import Progress, silent

WORST, CONTEXT = 10, 32
NO_GAIN = 0.9999  # a ratio below it asks for a word on what it means
TOOLS = ("torch", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True)
class ValidateOptions:
    """What to compare, and how.

    Attributes:
        adapters: folders of LoRA adapters to merge into the reference, and a factor for each.
        text: .txt, .jsonl or .ids; default: the text of the bundle or of the checkpoint, else the built-in corpus.
        against: a second bundle of the same checkpoint, or the original of a quantized checkpoint.
        layers: compare every sub-block.
        gate: ``strict``, ``default``, ``loose`` or a TOML file; None measures without judging.
        max_tokens, length: tokens of text in total, and in one sequence.
        greedy: generate with both models if they fit into memory.
        memory: bytes to use at most; default: the available memory.
    """

    adapters: tuple[tuple[str, float], ...] = ()
    text: Path | None = None
    against: Path | None = None
    layers: bool = False
    gate: str | None = "default"
    max_tokens: int = 4096
    length: int = 512
    greedy: bool = True
    memory: int | None = None


def validate(
    bundle: str | Path,
    reference: str | Path,
    options: ValidateOptions = ValidateOptions(),
    progress: Progress = silent,
) -> Report:
    """Measure a bundle's accuracy against its checkpoint, and apply a gate.

    The report says whether the gate was passed; a failed gate raises nothing.

    Raises:
        BundleError, CheckpointError, ConfigError, TextError: one of the inputs is damaged or not supported.
        RequestError: options that do not fit together, or a comparison that does not fit into memory.
    """
    start = time.monotonic()
    bundles = _open_bundles(Path(bundle), options)
    gate = None if options.gate is None else load_gate(options.gate, bundles[0].manifest)
    with _opened(bundles, reference, options) as models:
        text = _choose_text(models, options)
        measured = _measure(models, text, options, progress)
    report = _report(reference, models, text, measured, options)
    if gate is not None:
        _apply(gate, report)
    report.notes += _open_questions(report)
    report.tools = {name: version(name) for name in TOOLS} | {"python": platform.python_version()}
    report.seconds = round(time.monotonic() - start, 1)
    report.peak_rss_bytes = peak_memory()
    return report


@dataclass(frozen=True)
class Measured:
    """What the work found.

    Attributes:
        notes: what a reader of the report should know.
        estimated_bytes: memory that the work needs.
    """

    comparisons: list[Comparison]
    walked: Walked
    notes: list[str]
    estimated_bytes: int


def _measure(models: Models, text: Text, options: ValidateOptions, progress: Progress) -> Measured:
    """Run all models over the text, and then generate with them."""
    count = len(models.bundles) + (models.original is not None)
    work = Work([len(ids) for ids in text.sequences], count, options.layers)
    available = available_memory() if options.memory is None else options.memory
    needed = require_memory(models.checkpoint.config, models.task, work, available)
    comparisons = _comparisons(models)
    walked = walk(models, text, options.layers, comparisons, progress)
    notes = _notes(models.bundles, text, walked.arithmetic)
    if options.greedy and models.task == "causal-lm":
        notes += add_greedy(models.checkpoint, models.bundles, text, comparisons, available, progress)
    for comparison in comparisons:
        comparison.summarize()
    return Measured(comparisons, walked, notes, needed)


def _report(
    reference: str | Path, models: Models, text: Text, measured: Measured, options: ValidateOptions
) -> Report:
    comparisons, walked, bundles = measured.comparisons, measured.walked, models.bundles
    report = Report(
        reference=Side("reference", str(reference), f"{models.task}, float32", "float32"),
        bundle=_side("bundle", bundles[0], walked.arithmetic[0]),
        against=_against(options.against, bundles, walked.arithmetic),
        task=models.task,
        text=text.source,
        tokens=text.tokens,
        sequences=len(text.sequences),
        comparisons=comparisons,
        blocks=walked.blocks if options.layers else None,
        worst=_worst(comparisons[0], text),
        notes=measured.notes,
        estimated_bytes=measured.estimated_bytes,
    )
    if models.original is not None:
        report.losses = losses(comparisons)
    report.at_export = _verdict_at_export(bundles[0])
    _judge_text(report, text, models.checkpoint.config.vocab_size)
    if options.layers:
        _find_wrong_blocks(report, walked.blocks)
    return report


# Before the work ----------------------------------------------------------------------------------


def _open_bundles(bundle: Path, options: ValidateOptions) -> list[Bundle]:
    second = [] if options.against is None or is_checkpoint(options.against) else [options.against]
    return [_open(folder) for folder in (bundle, *second)]


@contextmanager
def _opened(bundles: Sequence[Bundle], reference: str | Path, options: ValidateOptions) -> Iterator[Models]:
    """The bundles with their reference, and with its original if ``--against`` is a checkpoint."""
    with ExitStack() as files:
        task = bundles[0].manifest.task
        checkpoint = files.enter_context(Checkpoint.load(reference, task, options.adapters))
        bundles = [_matched(one, bundles[0], checkpoint) for one in bundles]
        original = None
        if options.against is not None and is_checkpoint(options.against):
            original = files.enter_context(open_original(options.against, checkpoint, options.adapters))
        yield Models(checkpoint, bundles, original)


def _open(folder: Path) -> Bundle:
    manifest = read_manifest(folder)
    check_opening(folder, manifest)
    missing = [
        name for name in (*manifest.graph_files, *manifest.weight_files) if not (folder / name).is_file()
    ]
    if missing:
        raise BundleError(
            f"{folder} holds an engine without the ONNX graph that it was built from, and validate runs the graph; "
            "export it again with --keep-onnx, or validate a bundle of the same checkpoint with --target native"
        )
    return Bundle(folder, manifest)


def _matched(one: Bundle, first: Bundle, checkpoint: Checkpoint) -> Bundle:
    """The bundle, with the adapter of the reference that it applies at run time.

    Raises:
        RequestError: the bundle is for another model, task or adapters than the reference.
    """
    manifest, config = one.manifest, checkpoint.config
    if manifest.task != first.manifest.task:
        raise RequestError(f"{one.folder} is for {manifest.task}, {first.folder} for {first.manifest.task}")
    shapes = {
        "vocabulary": (manifest.model.vocab_size, config.vocab_size),
        "hidden size": (manifest.model.hidden_size, config.hidden_size),
        "layers": (manifest.model.num_layers, config.num_hidden_layers),
        "heads": (manifest.model.num_heads, config.num_attention_heads),
        "KV heads": (manifest.model.num_kv_heads, config.num_key_value_heads),
        "head size": (manifest.model.head_dim, config.head_dim),
    }
    wrong = [
        f"{name} {mine} instead of {theirs}" for name, (mine, theirs) in shapes.items() if mine != theirs
    ]
    if wrong:
        raise RequestError(
            f"{one.folder} was not made from {checkpoint.folder}: {', '.join(wrong)}; give the checkpoint it was made from"
        )
    mine, theirs = (
        [(each.sha256, each.scale) for each in manifest.adapters],
        [(each.sha256(), each.scale) for each in checkpoint.adapters],
    )
    last = checkpoint.adapters[-1] if checkpoint.adapters else None
    if manifest.adapter_slots is not None and last is not None and mine == theirs[:-1] and last.scale == 1:
        return replace(one, adapter=str(last.folder))
    if mine != theirs:
        merged = ", ".join(f"{each.name}={each.scale:g}" for each in manifest.adapters)
        raise RequestError(
            f"{one.folder} was made with {merged or 'no adapter'}; give the reference the same ones by --lora"
        )
    return one


def _choose_text(models: Models, options: ValidateOptions) -> Text:
    length = min([options.length, *(one.manifest.limits.max_seq_len for one in models.bundles)])
    for name, value in (("length", length), ("max_tokens", options.max_tokens)):
        if value < 2:
            raise RequestError(f"{name} is {value}, but a token can be predicted only after another one")
    path = options.text or own_text(models.bundles[0].folder)
    return choose_text(models.checkpoint, path, length, options.max_tokens)


def _comparisons(models: Models) -> list[Comparison]:
    bundles = models.bundles
    names = ["bundle", "against"][: len(bundles)]
    pairs = [("reference", name, one) for name, one in zip(names, bundles, strict=True)]
    pairs += [("against", "bundle", bundles[0])] * (len(bundles) - 1)
    found = [
        Comparison(expected, actual, row_of(one.manifest), one.manifest.task, one.manifest.activations)
        for expected, actual, one in pairs
    ]
    if models.original is not None:
        found += original_comparisons(bundles[0].manifest, row_of(bundles[0].manifest))
    return found


def _side(name: str, one: Bundle, arithmetic: str) -> Side:
    manifest = one.manifest
    cache = f", KV cache {manifest.kv_cache}" if manifest.kv_cache not in (None, manifest.activations) else ""
    adapter = f", adapter {one.adapter} at run time" if one.adapter is not None else ""
    what = f"{manifest.target}, {manifest.precision}, activations {manifest.activations}{cache}{adapter}"
    return Side(name, str(one.folder), what, arithmetic)


def _against(path: Path | None, bundles: Sequence[Bundle], arithmetic: Sequence[str]) -> Side | None:
    if path is None or len(bundles) > 1:
        return None if path is None else _side("against", bundles[1], arithmetic[1])
    return Side(
        "original", str(path), f"{bundles[0].manifest.task}, float32, before its quantization", "float32"
    )


def _notes(bundles: Sequence[Bundle], text: Text, arithmetic: Sequence[str]) -> list[str]:
    notes = []
    if text.tokenizer is None or text.is_random:
        notes.append(
            f"The text is {text.source}: the errors are valid, but perplexity and agreement do not measure quality."
        )
    for one, computed in zip(bundles, arithmetic, strict=True):
        if one.manifest.engine is not None:
            notes.append(
                f"{one.folder} is a {one.manifest.engine.kind} engine: validate ran the ONNX graph that it was built from."
            )
        if computed != "as exported":
            notes.append(
                f"{one.folder}: the stored weights were computed in {computed}, since the CPU provider has no kernels "
                f"for {one.manifest.activations}; rounding of activations is not measured."
            )
    return notes


def _verdict_at_export(bundle: Bundle) -> dict[str, Any] | None:
    """The gate's entry in the bundle's report.json; None where there is none."""
    try:
        found = read_object(bundle.folder / REPORT, BundleError).get("gate")
    except BundleError:
        return None
    return found if isinstance(found, dict) else None


# After the work -----------------------------------------------------------------------------------


def _judge_text(report: Report, text: Text, vocab_size: int) -> None:
    """Say in the report whether the text is fit to judge quality by."""
    comparison = report.comparisons[0]
    guesses = text.is_text and _guesses(comparison, vocab_size)
    report.unfit_text = guesses or text.is_random
    if guesses:
        report.notes.append(_unfit(comparison, text, vocab_size))


def _find_wrong_blocks(report: Report, blocks: Sequence[BlockError]) -> None:
    report.culprit = find_culprit(blocks)
    report.out_of_band = [block for block in blocks if is_out_of_band(block)]
    report.comparisons[0].metrics["blocks_out_of_band"] = len(report.out_of_band)


def _apply(gate: Gate, report: Report) -> None:
    comparison = report.comparisons[0]
    report.gate = f"{gate.name}, {gate.row}"
    report.checks = gate.check(comparison.metrics, not report.unfit_text, comparison.compared)


def _guesses(comparison: Comparison, vocab_size: int) -> bool:
    """Whether the reference predicts the text worse than guessing with equal chances."""
    return comparison.perplexities is not None and comparison.perplexities[0].value > vocab_size


def _unfit(comparison: Comparison, text: Text, vocab_size: int) -> str:
    assert comparison.perplexities is not None
    return (
        f"The text ({text.source}) is unfit to judge by: the reference's own perplexity on it is "
        f"{comparison.perplexities[0].value:.0f}, and guessing among {vocab_size} tokens gives {vocab_size}. "
        "Give text like that which the model was trained on: --text FILE."
    )


def _open_questions(report: Report) -> list[str]:
    """Notes on the ratio of perplexities: below 1, and an interval that includes the limit."""
    ratio = report.comparisons[0].ratio
    if ratio is None:
        return []
    notes = []
    if ratio.value < NO_GAIN:
        notes.append(
            f"The bundle's perplexity is {100 * (1 - ratio.value):.2f} % below the reference's: chance and no gain. "
            "KL divergence and agreement say how far the bundle is from the reference."
        )
    check = next((check for check in report.checks if check.metric == "perplexity_ratio"), None)
    if (
        check is not None
        and ratio.low is not None
        and ratio.high is not None
        and ratio.low < check.limit < ratio.high
    ):
        notes.append(
            f"The limit of the perplexity ratio, {check.limit:g}, lies inside its interval: more text (--text, "
            "--max-tokens) would make the verdict sure."
        )
    return notes


def _worst(comparison: Comparison, text: Text) -> list[WorstPosition]:
    def shown(ids: Sequence[int]) -> str:
        if text.tokenizer is None:
            return " ".join(map(str, ids))
        decoded = text.tokenizer.decode(list(ids), skip_special_tokens=False)
        if len(ids) == 1 and "\ufffd" in decoded:  # a part of a character
            return hex_of_bytes(text.tokenizer.token_of(ids[0]))
        return decoded

    found = []
    for one, row in worst_positions(comparison, WORST):
        ids, index, target = text.sequences[one.sequence], int(one.index[row]), int(one.target[row])
        found.append(
            WorstPosition(
                kl=float(one.kl[row]),
                sequence=one.sequence,
                index=index,
                before=shown(ids[max(0, index + 1 - CONTEXT) : index + 1]),
                follows=None if target == NO_TARGET else shown([target]),
                expected=shown([int(one.expected_best[row])]),
                expected_probability=float(one.expected_probability[row]),
                actual=shown([int(one.actual_best[row])]),
                actual_probability=float(one.actual_probability[row]),
            )
        )
    return found
