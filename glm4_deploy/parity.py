"""Parity: compares the bundle's outputs with the reference model's.

Both models are streamed: one layer of each is in memory at a time, and the head runs in blocks of rows. So a model of
any size is compared on a small machine. If both models fit into memory, generated tokens are compared as well.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glm4_deploy.greedy import fits_whole, reference_start
from glm4_deploy.memory import available_memory
from glm4_deploy.metrics import Logits, kl_divergence, log_softmax, near_ties
from glm4_deploy.own_text import IDS, own_text
from glm4_deploy.texts import LINES, prefix_of, read_sequences
from glm4_deploy.thresholds import PARITY, PARITY_CACHE
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.element_types import ir_type
from glm4_exporters.pieces import GraphPieces
from glm4_exporters.streamed import reference_outputs
from glm4_runtime import SamplingParams, Session
from glm4_runtime.bundle import Manifest
from glm4_runtime.bundle.element_types import CACHE_TYPES, QUANTIZED_CACHES
from glm4_runtime.bundle.file_names import TOKENIZER
from glm4_runtime.errors import GateError, RequestError, TextError, UnavailableError
from glm4_runtime.progress import Progress, silent
from glm4_runtime.tokenizer import Tokenizer

SEQUENCE_LENGTHS = (64, 48, 64, 48, 1)  # of LINES
GREEDY_TOKENS = 32


@dataclass(frozen=True)
class ParityLimits:
    """The largest differences of a precision. None: no limit."""

    max_abs: float | None = None  # of the logits
    mean_kl: float | None = None  # nats, reference against bundle
    top1: float | None = None  # share of positions with the same best token
    relative: float = 0.0  # RMS of the difference over the reference's RMS, for tasks without a vocabulary


LIMITS = {precision: ParityLimits(**limits) for precision, limits in PARITY.items()}


@dataclass(frozen=True)
class Parity:
    """The differences between the bundle's outputs and the reference's, over all positions."""

    positions: int
    max_abs_error: float
    mean_abs_error: float
    relative_error: float
    mean_kl: float | None  # None for tasks without a vocabulary
    top1_agreement: float | None
    greedy_tokens: (
        int | None
    )  # number of tokens generated with both; None if the models do not fit into memory
    greedy_agreement: int | None  # number of equal tokens from the start
    greedy_gap: float | None  # difference of the reference's two logits at the first differing token
    arithmetic: str  # "as exported", or the type used instead
    text: str = "random token ids"  # source of the text
    reference_perplexity: float | None = None  # of the reference on the text
    fit_text: bool = True  # False for random ids, and if the reference predicts the text worse than guessing
    label_agreement: float | None = None  # of classifiers
    near_ties: int = 0  # positions with another best token, whose logits differ only by rounding

    @property
    def agreement(self) -> float:
        """Share of positions with the same best token, near ties included."""
        return (self.top1_agreement or 0.0) + self.near_ties / self.positions

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_parity(
    bundle: Path, manifest: Manifest, checkpoint: Checkpoint, progress: Progress = silent
) -> Parity:
    """Compare a bundle's folder with its checkpoint; both are streamed."""
    sample = choose_sample(bundle, manifest, checkpoint.folder)
    sequences = sample.sequences
    expected = reference_outputs(checkpoint, sequences, progress)
    pieces = GraphPieces(bundle)
    inputs = [graph_inputs(manifest, ids) for ids in sequences]
    outputs = pieces.run(inputs, progress)
    name = manifest.outputs[0].name
    actual = [batch[name].reshape(-1, batch[name].shape[-1]) for batch in outputs]
    greedy = _greedy(bundle, manifest, checkpoint, sequences[0], progress)
    found = _compare(manifest, expected, actual, greedy, pieces.arithmetic)
    return _on_text(found, manifest, sample, expected, actual)


def limits_of(manifest: Manifest) -> ParityLimits:
    """The limits of a bundle's precision, widened for a quantized cache."""
    limits, cache = LIMITS[manifest.precision], QUANTIZED_CACHES.get(str(manifest.kv_cache))
    if cache is None:
        return limits
    mean_kl, top1 = PARITY_CACHE[cache]
    most = (limits.mean_kl or 0.0) + mean_kl
    return replace(
        limits, max_abs=None, mean_kl=most, top1=None if limits.top1 is None else limits.top1 - top1
    )


def check_parity(parity: Parity, manifest: Manifest) -> None:
    """Check a measurement against the limits of the bundle's precision.

    Raises:
        GateError: naming every limit that is exceeded.
    """
    limits, wrong = limits_of(manifest), []

    def hold(what: str, value: float, limit: float, exceeded: bool) -> None:
        if exceeded or not np.isfinite(value):
            wrong.append(f"{what} is {value:.3g}, limit {limit:g}")

    if limits.max_abs is not None:
        hold("max abs error", parity.max_abs_error, limits.max_abs, parity.max_abs_error > limits.max_abs)
    if parity.mean_kl is None or parity.top1_agreement is None:
        hold(
            "relative error", parity.relative_error, limits.relative, parity.relative_error > limits.relative
        )
    else:
        if limits.mean_kl is not None:
            hold("mean KL", parity.mean_kl, limits.mean_kl, parity.mean_kl > limits.mean_kl)
        if limits.top1 is not None:
            hold("top-1 agreement", parity.agreement, limits.top1, parity.agreement < limits.top1)
    # Two logits that are closer than twice the allowed error may change places.
    if limits.max_abs is not None and parity.greedy_gap is not None:
        hold(
            "logit gap at the first differing token",
            parity.greedy_gap,
            2 * limits.max_abs,
            parity.greedy_gap > 2 * limits.max_abs,
        )
    if wrong:
        quantized = manifest.kv_cache in QUANTIZED_CACHES
        cache = f" with a KV cache in {QUANTIZED_CACHES[str(manifest.kv_cache)]}" if quantized else ""
        raise GateError(
            f"the bundle does not match the reference in {manifest.precision}{cache}: {'; '.join(wrong)}"
        )


@dataclass(frozen=True)
class Sample:
    """A handful of token sequences.

    Attributes:
        source: where they are from.
        prefix: tokens at the start of each that the tokenizer added; None for random ids.
    """

    sequences: list[list[int]]
    source: str
    prefix: int | None


def choose_sample(bundle: Path, manifest: Manifest, checkpoint: Path) -> Sample:
    """The text that the bundle keeps, else the checkpoint's own, else our lines where the bundle has a tokenizer, else
    seeded random ids."""
    tokenizer = Tokenizer.from_folder(bundle) if TOKENIZER in manifest.files else None
    prefix, path = len(prefix_of(tokenizer)), own_text(bundle, checkpoint)
    own = read_own_text(path, tokenizer, manifest.limits.max_seq_len, manifest.model.vocab_size)
    if path is not None and own:
        return Sample(own, path.name, 0 if path.suffix == IDS else prefix)
    if tokenizer is None:
        return Sample(sample_sequences(bundle, manifest), "random token ids", None)
    return Sample(sample_sequences(bundle, manifest), "built-in lines", prefix)


def read_own_text(
    path: Path | None, tokenizer: Tokenizer | None, max_seq_len: int, vocab_size: int
) -> list[list[int]]:
    """The first sequences of a model's own text; none without a file, without a tokenizer for text, or if no text fits
    a sequence.

    Raises:
        TextError: the file cannot be read as text of this model.
    """
    length = min(max(SEQUENCE_LENGTHS), max_seq_len)
    if path is None or length <= len(prefix_of(tokenizer)) + 2 or (tokenizer is None and path.suffix != IDS):
        return []
    try:
        found = read_sequences(path, tokenizer, length, len(SEQUENCE_LENGTHS), vocab_size)
    except TextError as error:
        raise TextError(f"{error}; export compares on this file: mend it or remove it") from error
    return [ids[:most] for ids, most in zip(found, SEQUENCE_LENGTHS, strict=False)]


def sample_sequences(bundle: Path, manifest: Manifest) -> list[list[int]]:
    """Our lines if the bundle has a tokenizer, otherwise seeded random ids."""
    rng = np.random.default_rng(20250414)
    vocab, limit = manifest.model.vocab_size, manifest.limits.max_seq_len
    tokenizer = Tokenizer.from_folder(bundle) if TOKENIZER in manifest.files else None
    sequences = []
    for text, length in zip(LINES, SEQUENCE_LENGTHS, strict=True):
        random = rng.integers(0, vocab, min(length, limit)).tolist()
        ids = [] if tokenizer is None else [i for i in tokenizer.encode(text)[:limit] if i < vocab]
        sequences.append(ids[:length] or random)
    return sequences


def graph_inputs(manifest: Manifest, ids: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """The graph's inputs for one whole sequence with an empty cache, with all logits."""
    count, model = len(ids), manifest.model
    inputs: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.array([ids], np.int64),
        "query_lengths": np.array([count], np.int32),
    }
    if manifest.task == "causal-lm":
        # An engine's graph has a cache of the activations' type. A graph in bfloat16 is computed in float32: see
        # GraphPieces.
        cache = str(manifest.kv_cache) if manifest.engine is None else manifest.activations
        stored = CACHE_TYPES["float32" if manifest.activations == "bfloat16" else cache]
        empty = np.zeros(
            (1, model.num_kv_heads, count, stored.row(model.head_dim)), ir_type(stored.element).numpy()
        )
        inputs |= {"past_lengths": np.zeros(1, np.int32), "logits_indices": np.arange(count)[None]}
        inputs |= {spec.name: empty for spec in manifest.inputs if spec.name.startswith("past_key_values.")}
    return inputs


def _on_text(
    found: Parity, manifest: Manifest, sample: Sample, expected: list[Logits], actual: list[Logits]
) -> Parity:
    """The measurement with what the text and the task add to it."""
    labels = perplexity = None
    if manifest.task.endswith("classification"):
        same = [one.argmax(-1) == other.argmax(-1) for one, other in zip(expected, actual, strict=True)]
        labels = float(np.concatenate(same).mean())
    if manifest.task == "causal-lm" and sample.prefix is not None:
        perplexity = _perplexity(sample, expected)
    fit = sample.prefix is not None and (perplexity is None or perplexity <= manifest.model.vocab_size)
    return replace(
        found,
        text=sample.source,
        fit_text=fit,
        reference_perplexity=perplexity,
        label_agreement=labels,
    )


def _perplexity(sample: Sample, expected: list[Logits]) -> float | None:
    """exp of the mean loss of the tokens behind the prefix; None where there is none."""
    first = max(sample.prefix or 0, 1)
    losses = [
        -log_softmax(logits[at - 1 : at].astype(np.float64))[0, ids[at]]
        for ids, logits in zip(sample.sequences, expected, strict=True)
        for at in range(first, len(ids))
    ]
    return float(np.exp(min(np.mean(losses), 700.0))) if losses else None


def _compare(
    manifest: Manifest,
    expected: list[Logits],
    actual: list[Logits],
    greedy: tuple[int, float] | None,
    arithmetic: str,
) -> Parity:
    errors = [np.abs(a.astype(np.float64) - e) for a, e in zip(actual, expected, strict=True)]
    positions = sum(len(e) for e in expected)
    squares = (
        sum(float((e**2).sum()) for e in errors),
        sum(float((e.astype(np.float64) ** 2).sum()) for e in expected),
    )
    kl = agreement = None
    ties = 0
    if manifest.task == "causal-lm":
        kl = float(
            np.concatenate([kl_divergence(e, a) for e, a in zip(expected, actual, strict=True)]).mean()
        )
        same = [e.argmax(-1) == a.argmax(-1) for e, a in zip(expected, actual, strict=True)]
        agreement = float(np.concatenate(same).mean())
        ties = sum(
            int(near_ties(e, a, manifest.activations).sum()) for e, a in zip(expected, actual, strict=True)
        )
    return Parity(
        positions=positions,
        max_abs_error=float(max(np.nan_to_num(e, nan=np.inf).max() for e in errors)),
        mean_abs_error=float(np.concatenate([e.mean(-1) for e in errors]).mean()),
        relative_error=float(np.sqrt(squares[0] / max(squares[1], 1e-300))),
        mean_kl=kl,
        top1_agreement=agreement,
        greedy_tokens=None if greedy is None else GREEDY_TOKENS,
        greedy_agreement=None if greedy is None else greedy[0],
        greedy_gap=None if greedy is None or greedy[0] == GREEDY_TOKENS else greedy[1],
        arithmetic=arithmetic,
        near_ties=ties,
    )


def _greedy(
    bundle: Path, manifest: Manifest, checkpoint: Checkpoint, prompt: Sequence[int], progress: Progress
) -> tuple[int, float] | None:
    """Number of equal tokens among 32 greedy ones, and the reference's logit gap at the first difference.

    None for a task without generation, without a provider, or if both models do not fit into memory.
    """
    room = manifest.limits.max_seq_len - GREEDY_TOKENS
    prompt = list(prompt[: min(16, room)])
    if manifest.task != "causal-lm" or room < 1 or not fits_whole(manifest, checkpoint, available_memory()):
        return None
    try:
        session = Session.open(bundle, max_batch_size=1)
    except UnavailableError:
        return None  # none of the manifest's providers is available
    ours: list[int] = []
    with session:
        try:
            tokens = session.generate(prompt, SamplingParams(max_tokens=GREEDY_TOKENS, ignore_eos=True))
            ours.extend(token.id for token in tokens)
        except RequestError as error:  # NaN logits; the prompt itself is valid
            raise GateError(
                f"the bundle does not match the reference in {manifest.precision}: after {len(ours)} tokens, {error}"
            ) from error
    progress("generate with the reference", 0, GREEDY_TOKENS)
    step = reference_start(checkpoint)()
    logits = step(prompt)
    for done, chosen in enumerate(ours):
        second, best = np.partition(logits, -2)[-2:]
        if int(logits.argmax()) != chosen:
            return done, float(best - second)
        progress("generate with the reference", done + 1, GREEDY_TOKENS)
        logits = step([chosen])
    return GREEDY_TOKENS, 0.0
