"""glm4-deploy export CHECKPOINT BUNDLE"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glm4_deploy import folders, hub, pipeline, show
from glm4_deploy.adapters import find_adapters, lora_option
from glm4_deploy.engine_bundle import engine_report
from glm4_deploy.plan import DEFAULT_BATCH, DEFAULT_PRECISION, DEFAULT_RANK, DEFAULT_TARGET
from glm4_exporters.cache_types import KV_CACHES
from glm4_exporters.engine.kinds import ATTENTIONS
from glm4_exporters.engine.options import ENGINE_LAYOUTS, EngineOptions
from glm4_exporters.targets import ACTIVATIONS, PRECISIONS, TARGETS
from glm4_runtime.bundle import Manifest
from glm4_runtime.bundle.element_types import CACHE_TYPES, CALIBRATED_CACHES, QUANTIZED_CACHES

if TYPE_CHECKING:
    from glm4_deploy.parity import Parity


def _stage_counts(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """The numbers of --stages; empty without the option."""
    if value is None:
        return ()
    parts = value.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) <= 5 for part in parts):
        raise click.BadParameter(
            f"{value[:100]!r} is neither a count of stages, as 2, nor a list of layer counts, as 20,20."
        )
    return tuple(map(int, parts))


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    default=DEFAULT_TARGET,
    show_default=True,
    help="The runtime of the bundle. ort: ONNX Runtime, CPU or CUDA. cpu: ONNX Runtime on a CPU with our own, faster kernels. "
    "native: any runtime of ONNX opset 24. tensorrt-rtx: TensorRT-RTX, exported without a GPU. "
    "tensorrt: TensorRT, exported on the GPU.",
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    show_default=f"what a quantized checkpoint brings, else {DEFAULT_PRECISION}",
    help="How weights are stored. int8 and int4: weights; on a CPU, matrix products also round their inputs to int8. int8-sq and fp8: weights and the inputs of matrix products. "
    "nvfp4 and mxfp8, for TensorRT: weights only, in blocks of 4-bit and 8-bit floats. nvfp4-w4a4: the inputs of products too. "
    "fp32, fp16, bf16: weights, activations and KV cache.",
)
@click.option(
    "--activations",
    type=click.Choice(list(ACTIVATIONS)),
    help="Type of activations of a quantized bundle, and of its KV cache without --kv-cache. Default: fp32, or fp16 for TensorRT.",
)
@click.option(
    "--kv-cache",
    type=click.Choice(KV_CACHES),
    default="auto",
    show_default=True,
    help="Type of the KV cache. auto: int8 on target cpu, else as the activations. fp32, fp16, bf16: for target cpu; other targets have the activations' type. "
    "int8: 8 bits; on target cpu with a scale in each row, on ort and tensorrt with a scale per head and channel from the calibration. "
    "fp8: 8-bit floats with such scales, for target tensorrt on GPUs from 8.9 on.",
)
@click.option(
    "--calibration",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="A file of text similar to the model's later input (.txt, .jsonl, .ids). Makes int4, nvfp4 and a quantized cache more accurate. "
    "Required for int8-sq, fp8 and nvfp4-w4a4.",
)
@click.option(
    "--text",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Text to compare on, similar to the model's training data (.txt, .jsonl, .ids). The bundle keeps it, and validate reads it. "
    "Default: heldout.txt of the checkpoint, or built-in lines.",
)
@click.option(
    "--recipe",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="A TOML file with formats of single matrices; validate --sensitivity writes one.",
)
@lora_option
@click.option(
    "--lora-slots",
    type=click.IntRange(min=0),
    metavar="N",
    default=0,
    show_default=True,
    help="Number of LoRA adapters that the bundle can take at run time, one per request. For cpu, ort and native.",
)
@click.option(
    "--lora-rank",
    type=click.IntRange(min=1),
    metavar="R",
    help=f"Maximum rank of such an adapter. Default: {DEFAULT_RANK}.",
)
@click.option(
    "--stages",
    callback=_stage_counts,
    metavar="N|A,B,...",
    help="Cut the model into N stages, each with its own graph, weights and KV cache, or into stages of A, B, ... layers. "
    "For TensorRT, each stage is an engine. Example: --stages 2.",
)
@click.option(
    "--task",
    type=click.Choice(["causal-lm", "sequence-classification", "token-classification", "encoder"]),
    help="The task of the model. Default: the task in config.json.",
)
@click.option(
    "--max-seq-len",
    type=int,
    metavar="N",
    help="Maximum tokens of a sequence, prompt and answer together. Default: the model's maximum.",
)
@click.option(
    "--max-batch-size",
    type=int,
    metavar="N",
    default=DEFAULT_BATCH,
    show_default=True,
    help="Maximum number of sequences at the same time.",
)
@click.option(
    "--sm",
    multiple=True,
    metavar="CC",
    help="Compute capability to build the engine for: 89 means 8.9. Repeat the option for several.",
)
@click.option(
    "--engine-layout",
    type=click.Choice(ENGINE_LAYOUTS),
    default=EngineOptions.layout,
    show_default=True,
    help="shared: one engine for prefill and decode. split: one engine each, which stores the weights twice.",
)
@click.option(
    "--attention",
    type=click.Choice(ATTENTIONS),
    help="Attention of a TensorRT engine. plugin: our kernel, the default for tensorrt. plugin-small: our kernel with less than "
    "48 KiB of shared memory. native: TensorRT's own, the default and only choice for tensorrt-rtx.",
)
@click.option(
    "--timing-cache",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="A file of kernel timings, read before and written after the build. For target tensorrt.",
)
@click.option("--revision", metavar="NAME", help="Branch, tag or commit, if CHECKPOINT is a name on the hub.")
@click.option(
    "--keep-onnx", is_flag=True, help="Keep the ONNX graph and weights that the engine was built from."
)
@click.option(
    "--no-parity", is_flag=True, help="Do not compare the bundle with PyTorch. report.json then says so."
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option(
    "--print-key", is_flag=True, help="Print the cache key of the bundle and stop. Reads no weights."
)
@click.option(
    "--key",
    type=click.Choice(["quick", "content"]),
    help="How --print-key identifies weights outside a hub cache. quick: by size and time of change, the default. "
    "content: by SHA-256, which reads them; a new download of the same files has the same key.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    checkpoint: Path,
    bundle: Path | None,
    target: str,
    precision: str | None,
    activations: str | None,
    kv_cache: str,
    calibration: str | None,
    text: str | None,
    recipe: str | None,
    lora: tuple[str, ...],
    lora_slots: int,
    lora_rank: int | None,
    stages: tuple[int, ...],
    task: str | None,
    max_seq_len: int | None,
    max_batch_size: int,
    sm: tuple[str, ...],
    engine_layout: str,
    attention: str | None,
    timing_cache: str | None,
    revision: str | None,
    keep_onnx: bool,
    no_parity: bool,
    force: bool,
    print_key: bool,
    key: str | None,
    as_json: bool,
) -> None:
    """Make a bundle from CHECKPOINT, and prove that it computes the same as PyTorch.

    CHECKPOINT is a folder, or a name on the hub such as THUDM/GLM-4-9B-0414.
    """
    engine = EngineOptions(sm, engine_layout, attention, timing_cache, keep_onnx)
    options = pipeline.ExportOptions(
        target=target,
        precision=precision,
        task=task,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        parity=not no_parity,
        activations=activations,
        calibration=calibration,
        text=text,
        recipe=recipe,
        kv_cache=kv_cache,
        engine=engine,
        lora_slots=lora_slots,
        lora_rank=lora_rank or DEFAULT_RANK,
        stages=stages,
    )
    if lora_rank is not None and not lora_slots:
        raise click.UsageError("--lora-rank needs --lora-slots.")
    folders.require_checkpoint(checkpoint)
    if key is not None and not print_key:
        raise click.UsageError("--key needs --print-key.")
    if print_key:
        options = replace(options, adapters=find_adapters(lora))
        folder = hub.local_folder(checkpoint, revision)
        click.echo(pipeline.cache_key(folder, options, by_content=key == "content"))
        return
    if bundle is None:
        raise click.UsageError("Missing argument 'BUNDLE', the folder to make.")
    show.require_writable(Path(timing_cache) if timing_cache else None)
    pipeline.require_destination(checkpoint, bundle, force)  # before a download, too
    with show.shown_progress() as progress:
        folder = hub.local_folder(checkpoint, revision, progress)
        options = replace(options, adapters=find_adapters(lora, progress))
        result = pipeline.export(folder, bundle, options, force=force, progress=progress)
    if as_json:
        show.print_json(_as_json(result))
    else:
        show.print_rows(f"{bundle}", _rows(result))


def _runs_on(manifest: Manifest) -> str:
    if manifest.engine is None:
        return ", ".join(manifest.providers) or "none of ONNX Runtime's providers; another conforming runtime"
    gpus = ", ".join(f"{sm[:-1]}.{sm[-1]}" for sm in manifest.compute_capabilities)
    later = " and newer ones that it names" if manifest.engine.later_gpus else ""
    return f"{manifest.engine.kind} {manifest.engine.version}, GPUs of compute capability {gpus}{later}"


def _adapter_slots(manifest: Manifest) -> list[tuple[str, str]]:
    slots = manifest.adapter_slots
    return [] if slots is None else [("adapters", f"{slots.count} at run time, of rank up to {slots.rank}")]


def _stage_rows(manifest: Manifest) -> list[tuple[str, str]]:
    return [
        (
            "stages" if number == 1 else "",
            f"{number}: {stage.layers} layers, "
            f"{show.readable_size(sum(manifest.files[name].bytes for name in stage.data_files))}",
        )
        for number, stage in enumerate(manifest.stages, 1)
    ]


def _as_json(result: pipeline.ExportResult) -> dict[str, object]:
    return {
        "bundle": str(result.bundle),
        "parity": result.parity and result.parity.as_dict(),
        "gate": result.gate and result.gate.as_dict(),
        "seconds": result.seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "warnings": result.warnings,
        "engine": result.engine and engine_report(result.engine),
        "source": result.source,
        "files": {name: entry.bytes for name, entry in result.manifest.files.items()},
    }


def _rows(result: pipeline.ExportResult) -> list[tuple[str, str]]:
    manifest, parity = result.manifest, result.parity
    rows = [
        ("task", manifest.task),
        ("target", f"{manifest.target}, {manifest.precision}"),
        *[("adapter", f"{each.name} times {each.scale:g}, merged") for each in manifest.adapters],
        *_adapter_slots(manifest),
        *_stage_rows(manifest),
        ("runs on", _runs_on(manifest)),
        ("size", show.readable_size(sum(entry.bytes for entry in manifest.files.values()))),
        ("time", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())),
        ("peak memory", show.readable_size(result.peak_rss_bytes)),
    ]
    rows += [("warning", warning) for warning in result.warnings]
    if result.source is not None:
        rows.append(("source", f"quantized by {result.source['method']}, {result.source['stored']}"))
    if manifest.kv_cache in CALIBRATED_CACHES:
        text, tokens = (result.calibration[key] for key in ("text", "tokens"))
        rows.append(
            ("KV cache", f"{QUANTIZED_CACHES[manifest.kv_cache]}, calibrated on {tokens} tokens: {text}")
        )
    elif manifest.kv_cache not in (None, manifest.activations):
        rows.append(("KV cache", CACHE_TYPES[str(manifest.kv_cache)].short))
    if result.engine is not None:
        rows.append(("engine build", f"{show.readable_size(result.engine.built.peak_rss_bytes)} at its peak"))
        rows += [("warning", warning) for warning in result.engine.built.warnings]
    if parity is None:
        return [*rows, ("parity", "not measured (--no-parity)")]
    return rows + _parity_rows(parity) + _gate_rows(result)


def _parity_rows(parity: "Parity") -> list[tuple[str, str]]:
    errors = [f"max error {parity.max_abs_error:.2e}", f"mean {parity.mean_abs_error:.2e}"]
    if parity.mean_kl is not None and parity.top1_agreement is not None:
        ties = f" and {parity.near_ties} ties" if parity.near_ties else ""
        errors += [f"KL {parity.mean_kl:.2e}", f"top-1 {100 * parity.top1_agreement:.1f} %{ties}"]
    rows = [("parity", f"{', '.join(errors)} over {parity.positions} positions")]
    if parity.arithmetic != "as exported":
        rows.append(
            (
                "",
                f"the stored weights, computed in {parity.arithmetic}: rounding of activations is not measured here",
            )
        )
    if parity.greedy_agreement is not None:
        same = f"{parity.greedy_agreement} of {parity.greedy_tokens} tokens as PyTorch's"
        rows.append(("greedy", f"{same}, of one prompt (validate judges by the median of several)"))
    return rows


def _gate_rows(result: pipeline.ExportResult) -> list[tuple[str, str]]:
    found, parity = result.gate, result.parity
    if found is None or parity is None:
        return []
    rows = [("gate", f"{found.gate}: {found.verdict} on {found.text}")]
    rows += [("", check.brief) for check in found.checks]
    if parity.label_agreement is not None:
        rows.insert(0, ("labels", f"{100 * parity.label_agreement:.2f} % the same"))
    if found.verdict == "not judged":
        why = (
            f"the reference's own perplexity on this text is {parity.reference_perplexity:.0f}, no better than guessing"
            if parity.reference_perplexity is not None
            else "random token ids say nothing of quality"
        )
        rows.append(("", f"{why}; judge by validate --text FILE"))
    return rows
