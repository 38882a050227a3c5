"""Calibration, before a graph is traced: decides from a text how weights are stored.

prepared = prepare(checkpoint, form, text, progress)
prepared.edits          # for the weights' writer
prepared.norm_bits      # for the canonical graph
prepared.input_scales   # for the products whose format rounds their inputs
prepared.cache_scales   # for the lowered graph
prepared.report         # for report.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from glm4_deploy.texts import LINES, cut_text, random_sequences, read_sequences
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.form import Form
from glm4_exporters.formats.base import FittedFormat
from glm4_runtime.bundle.element_types import CALIBRATED_CACHES
from glm4_runtime.bundle.file_names import TOKENIZER
from glm4_runtime.progress import Progress, silent
from glm4_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from glm4_exporters.quantize.awq import AwqSearch, QuantizeDequantize
    from glm4_exporters.quantize.calibrate import Calibration, Magnitudes
    from glm4_exporters.quantize.kv_cache import CacheScales
    from glm4_exporters.quantize.overflow import Remedy
    from glm4_exporters.quantize.smooth import ScaleSearch, Smoothing
    from glm4_exporters.quantize.static import StaticSmoothQuant
    from glm4_exporters.weights import Edits

SEQUENCE, SEQUENCES = 512, 64  # tokens of a sequence, and number of sequences to read

BUILT_IN_LENGTH = 64
NO_SCALES: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class CalibrationText:
    """The calibration text: sequences of token ids, and their source."""

    sequences: list[list[int]]
    origin: str
    given: bool = True  # given by the user, so that weights may be fitted to it


@dataclass(frozen=True)
class Prepared:
    """The results of the calibration.

    Attributes:
        edits: changes of tensors before they are stored.
        norm_bits: k by the scope of each norm whose input is scaled by 2^-k.
        cache_scales: fixed scales of every layer's cache, if it has them.
        calibration: the statistics; None if not needed.
        input_scales: by matrix whose format rounds inputs: the scale of its input.
        report: for ``report.json``.
        key_factors: by layer, float32 [Hkv, D], if rows of the cache have scales of their own.
    """

    edits: "Edits"
    norm_bits: Mapping[str, int] = field(default_factory=dict)
    cache_scales: "tuple[CacheScales, ...]" = ()
    calibration: "Calibration | None" = None
    input_scales: Mapping[str, float] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    key_factors: "tuple[Magnitudes, ...]" = ()


def read_text(source: Checkpoint, path: Path | None, max_seq_len: int) -> CalibrationText:
    """Sequences of the user's file, or of a few lines of ours, or random ids without a tokenizer."""
    folder, vocab = source.folder, source.config.vocab_size
    tokenizer = Tokenizer.from_folder(folder) if (folder / TOKENIZER).is_file() else None
    if path is not None:
        sequences = read_sequences(path, tokenizer, min(SEQUENCE, max_seq_len), SEQUENCES, vocab)
        return CalibrationText(sequences, path.name)
    if tokenizer is not None:
        length = min(BUILT_IN_LENGTH, max_seq_len)
        found = [ids for text in LINES for ids in cut_text(text, tokenizer, length)]
        found = [ids for ids in found if max(ids) < vocab]
        if found:
            return CalibrationText(found, "built in", given=False)
    length = min(BUILT_IN_LENGTH, max_seq_len)
    return CalibrationText(
        random_sequences(vocab, length, len(LINES)), "random ids, for want of a tokenizer", given=False
    )


def needs_text(form: Form, given: bool) -> bool:
    """Whether the export calibrates: always with a given text, with fp16 activations (overflow), and with a
    cache of fixed scales."""
    return given or form.activations == "float16" or form.kv_cache in CALIBRATED_CACHES


def prepare(
    source: Checkpoint,
    form: Form,
    text: CalibrationText | None,
    progress: Progress = silent,
    brought: Mapping[str, float] = NO_SCALES,
) -> Prepared:
    """Run the reference over the text once, and decide scales, importance and remedies.

    Args:
        brought: the checkpoint's own scales for the inputs of all products that round them. Then none is searched.

    Raises:
        GateError: fp16 activations cannot hold what this model computes.
        ExportError: more text than fits in memory.
    """
    from glm4_exporters.weights import Edits

    if text is None:
        return Prepared(Edits(), input_scales=brought)
    from glm4_exporters.quantize.calibrate import calibrate
    from glm4_exporters.quantize.gptq import round_matrices, those_that_fit
    from glm4_exporters.quantize.kv_cache import MARGIN, cache_scales
    from glm4_exporters.quantize.overflow import Remedy, remedies, require_range
    from glm4_exporters.quantize.smooth import Smoothing

    awq = _awq(source, form) if text.given else None
    static = None if brought else _static(source, form)
    searches = [search for search in (awq, static) if search is not None]
    calibration = calibrate(source, text.sequences, *searches, progress=progress)
    smoothing = Smoothing()
    for search in searches:
        smoothing = smoothing.then(search.smoothing)
    report = _report(text, calibration, smoothing, searches)
    if awq is not None:
        report["rounded_on_tokens"] = sum(map(len, those_that_fit(text.sequences, source.config)))
    remedy = Remedy()
    if form.activations == "float16":
        require_range(calibration, smoothing)
        remedy = remedies(calibration, source.config, smoothing)
        smoothing = smoothing.then(remedy.weights)
    scales: tuple[CacheScales, ...] = ()
    if form.kv_cache in CALIBRATED_CACHES:
        scales = cache_scales(calibration, smoothing, form.kv_cache)
        report["kv_cache"] = {"scales": "per head and channel, of K and of V apart", "margin": MARGIN}
    rounded = (
        {}
        if awq is None
        else round_matrices(source, text.sequences, form, smoothing, remedy.norm_bits, progress)
    )
    return Prepared(
        Edits(smoothing, rounded),
        remedy.norm_bits,
        scales,
        calibration,
        _remedied(dict(brought), remedy)
        if brought
        else _input_scales(form, calibration, smoothing, static, remedy),
        report,
    )


def _report(
    text: CalibrationText,
    calibration: "Calibration",
    smoothing: "Smoothing",
    searches: "Sequence[ScaleSearch]",
) -> dict[str, Any]:
    """What ``report.json`` says of the calibration."""
    from glm4_exporters.quantize.overflow import audit

    report: dict[str, Any] = {
        "text": text.origin,
        "tokens": calibration.tokens,
        "sequences": calibration.sequences,
        "largest_activations": audit(calibration, smoothing),
    }
    if searches:
        report["scales"] = [
            {"tensors": list(c.names), "method": c.method, "error_before": c.error_before, "error": c.error}
            for search in searches
            for c in search.choices
        ]
    return report


def _static(source: Checkpoint, form: Form) -> "StaticSmoothQuant | None":
    """The joint search for smoothing and input scales; None if no format needs it."""
    from glm4_exporters.quantize.static import StaticSmoothQuant

    wanted = _searched_inputs(form)
    if not wanted:
        return None
    return StaticSmoothQuant(
        source.config,
        lambda names: not wanted.isdisjoint(names),
        rounds_input=wanted.__contains__,
        quantize_dequantize=_quantize_dequantize(form),
    )


def _searched_inputs(form: Form) -> set[str]:
    """The matrices whose input scale is searched together with a smoothing."""
    return {name for name, rounding in form.rounded_inputs.items() if rounding.searched}


def _input_scales(
    form: Form,
    calibration: "Calibration",
    smoothing: "Smoothing",
    static: "StaticSmoothQuant | None",
    remedy: "Remedy",
) -> dict[str, float]:
    """The input scale of every product that rounds its input, after the remedy."""
    rounded, searched = form.rounded_inputs, {} if static is None else static.input_scales
    largest = {
        name: float(smoothing.input_absmax(calibration, name).max())
        for name, rounding in rounded.items()
        if not rounding.searched
    }
    found = {name: rounded[name].scale(absmax) for name, absmax in _remedied(largest, remedy).items()}
    return found | _remedied({name: searched[name] for name in rounded if name not in found}, remedy)


def _remedied(inputs: dict[str, float], remedy: "Remedy") -> dict[str, float]:
    """Magnitudes of the matrices' inputs after the remedy; values and up are the input of one matrix each."""
    for index, bits in remedy.layers.items():
        for matrix, k in {"self_attn.o_proj": bits.value, "mlp.down_proj": bits.up}.items():
            name = f"model.layers.{index}.{matrix}.weight"
            if name in inputs:
                inputs[name] *= 2.0**-k
    return inputs


def _awq(source: Checkpoint, form: Form) -> "AwqSearch | None":
    """The search for smoothing scales of matrices with fewer than 8 bits; None if there are none.

    A site has only one search: if the input scale of a matrix is searched, :func:`_static` does it.
    """
    from glm4_exporters.quantize.awq import AwqSearch

    low = {name for name, each in form.encodings.items() if each.bits < 8 and isinstance(each, FittedFormat)}
    if not low:
        return None
    others = _searched_inputs(form)
    return AwqSearch(
        source.config,
        lambda names: not low.isdisjoint(names) and others.isdisjoint(names),
        quantize_dequantize=_quantize_dequantize(form),
    )


def _quantize_dequantize(form: Form) -> "QuantizeDequantize":
    """Quantize rows of a matrix in its own format, and dequantize them."""
    import torch

    formats = form.encodings

    def quantized(name: str, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        own = formats.get(name)
        if own is None:
            return weight
        largest = float(weight.abs().max())
        encoded = own.encode(weight, torch.bfloat16, importance=importance, largest=largest)
        return own.decode(encoded, weight.shape[1])

    return quantized
