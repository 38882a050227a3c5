"""Measures a model's activations on calibration text, with one layer in memory at a time.

    calibration = calibrate(checkpoint, sequences, *consumers, progress=progress)

A consumer is called for every *site*: one input and the matrices that read it, while their float32 weights are in
memory. The sites of a layer are q, k and v; o_proj; gate_up; down_proj; and after the last layer the head. The data of
a site are statistics per channel, and samples of the input's rows and of the matrices' rows. Their size is bounded for
any model and text.

The result, a :class:`Calibration`, has the statistics of all sites, of the KV cache, and of values that may overflow
in fp16. It is small.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from glm4_exporters import streamed
from glm4_exporters.architecture import HEAD, LAYER_SITES, MATRICES, site_width
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.reference import Glm4DecoderLayer, rotary_tables, rotate
from glm4_runtime.errors import ExportError
from glm4_runtime.progress import Progress, silent

Magnitudes = npt.NDArray[np.float32]

SAMPLED_TOKENS = 512
SAMPLED_WEIGHT_ROWS = 1024
SCORES_BLOCK = 1 << 24  # number of attention scores in memory at a time
MOST_STATE_BYTES = 1 << 30  # for all tokens' hidden states, and for the longest sequence's activations
# Copies in memory at the same time: gate, up, silu(gate), their product, and the product's magnitudes.
CALIBRATION_MLP_COPIES = 5
TEXT_SEED = 0

# The values whose maximum is kept per layer. ``scores`` are scaled and masked; ``product`` is silu(gate) * up;
# ``residual`` is the larger of the layer's two sums.
PEAKS = ("attention_input", "scores", "value", "o_proj", "mlp_input", "gate", "up", "product", "down_proj", "residual")  # fmt: skip

CACHE_STATISTICS = ("key_absmax", "key_radius", "value_absmax")


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one matrix input over all calibration tokens, per channel [channels]."""

    absmax: Magnitudes
    mean_abs: Magnitudes
    mean_square: Magnitudes


@dataclass(frozen=True)
class Site:
    """One input and the matrices that read it.

    Attributes:
        names: canonical names of the matrices, [rows, channels] each.
        sample: the input of at most ``SAMPLED_TOKENS`` tokens, float32 [n, channels].
        weight_sample: at most ``SAMPLED_WEIGHT_ROWS`` rows, evenly spaced over the matrices below one another.
        weight_absmax: per channel, over all rows of the matrices.
        sampled: how many rows of ``weight_sample`` are each matrix's, in the order of ``names``.
    """

    names: tuple[str, ...]
    statistics: InputStatistics
    sample: Tensor
    weight_sample: Tensor
    weight_absmax: Tensor
    sampled: tuple[int, ...]


class Consumer(Protocol):
    """Called once per site, layer by layer. The consumer keeps its own results."""

    def __call__(self, site: Site) -> None: ...


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer: of each site, of the stored cache [Hkv, D], and the largest values.

    ``key_radius`` is the length of a rotated pair: the largest |K| that it can have at any position.
    """

    sites: Mapping[str, InputStatistics]
    key_absmax: Magnitudes
    key_radius: Magnitudes
    value_absmax: Magnitudes
    peaks: Mapping[str, float]


@dataclass(frozen=True)
class Calibration:
    """All statistics of one run over the text.

    Attributes:
        head: the vocabulary head's input; None for a task without one.
        tokens: number of tokens.
        sequences: number of sequences.
    """

    layers: tuple[LayerStatistics, ...]
    head: InputStatistics | None
    tokens: int
    sequences: int

    def input_of(self, name: str) -> InputStatistics:
        """Statistics of the input of the matrix with this canonical name.

        Raises:
            KeyError: there are none: for the embedding or a score head.
        """
        if name == HEAD and self.head is not None:
            return self.head
        parts = name.split(".")
        if parts[:2] != ["model", "layers"]:
            raise KeyError(name)
        return self.layers[int(parts[2])].sites[MATRICES[".".join(parts[3:-1])].site]


@torch.inference_mode()
def calibrate(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    *consumers: Consumer,
    progress: Progress = silent,
) -> Calibration:
    """Run the reference model over ``sequences``, and call ``consumers`` for every site.

    Deterministic: the same checkpoint and sequences give the same samples and statistics. In memory are one
    layer in float32, the hidden states of all tokens, and one sequence's activations.

    Raises:
        ExportError: there is no token, a token outside the vocabulary, or more tokens than fit into memory.
        CheckpointError: a weight is damaged.
    """
    _check(checkpoint.config, sequences)
    config, lengths = checkpoint.config, [len(ids) for ids in sequences]
    picks = _sampled_positions(lengths)
    hidden = streamed.embed_sequences(checkpoint, sequences)
    layers = streamed.layers(checkpoint)
    measured = []
    for index in range(config.num_hidden_layers):
        done = index * sum(lengths)

        def report(tokens: int, done: int = done) -> None:
            progress("calibrate", done + tokens, config.num_hidden_layers * sum(lengths))

        # No variable here may keep a layer while the next one is read, so this is a function call.
        measured.append(_measure_layer(next(layers), config, hidden, picks, consumers, report))
    head = _measure_head(checkpoint, hidden, picks, consumers) if checkpoint.task == "causal-lm" else None
    progress("calibrate", config.num_hidden_layers * sum(lengths), config.num_hidden_layers * sum(lengths))
    return Calibration(tuple(measured), head, sum(lengths), len(lengths))


def _check(config: Glm4Config, sequences: Sequence[Sequence[int]]) -> None:
    if not sequences or not all(sequences):
        raise ExportError(
            "calibration needs at least one sequence, none of them empty; give --calibration more text"
        )
    tokens, longest = sum(map(len, sequences)), max(map(len, sequences))
    limits = {
        "tokens in all": (tokens, MOST_STATE_BYTES // (4 * config.hidden_size)),
        "tokens in one sequence": (
            longest,
            MOST_STATE_BYTES // (4 * CALIBRATION_MLP_COPIES * config.intermediate_size),
        ),
    }
    for what, (count, most) in limits.items():
        if count > most:
            raise ExportError(
                f"calibration takes at most {most} {what} for this model, not {count}; give less text"
            )
    wrong = next((i for ids in sequences for i in ids if not 0 <= i < config.vocab_size), None)
    if wrong is not None:
        raise ExportError(
            f"the calibration text holds the token {wrong}, but the vocabulary has {config.vocab_size}; "
            "use the checkpoint's own tokenizer"
        )


def _sampled_positions(lengths: Sequence[int]) -> list[Tensor]:
    """The sampled positions of each sequence; the same in every layer."""
    total = sum(lengths)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(TEXT_SEED))
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[order[:SAMPLED_TOKENS]] = True
    return [part.nonzero()[:, 0] for part in chosen.split(list(lengths))]


def _measure_layer(
    layer: Glm4DecoderLayer,
    config: Glm4Config,
    hidden: list[Tensor],
    picks: Sequence[Tensor],
    consumers: Sequence[Consumer],
    report: "_Report",
) -> LayerStatistics:
    """Run ``hidden`` through the layer, in place, and measure."""
    meter = _LayerMeter(config)
    done = 0
    with meter.attached_to(layer):
        for i, positions in enumerate(picks):
            report(done)
            meter.positions = positions
            hidden[i] = layer(hidden[i], BlockedAttention(config, hidden[i].shape[1], meter))
            meter.peak("residual", hidden[i])
            done += hidden[i].shape[1]
    statistics = {name: inputs.statistics() for name, inputs in meter.inputs.items()}
    for name, matrices in LAYER_SITES.items() if consumers else ():
        weights = [layer.get_parameter(f"{matrix}.weight").data for matrix in matrices]
        sample = _sampled_rows([w.shape[0] for w in weights], [iter([w]) for w in weights])
        names = tuple(f"model.layers.{layer.self_attn.layer}.{matrix}.weight" for matrix in matrices)
        site = Site(names, statistics[name], meter.inputs[name].sample(), *sample)
        for consumer in consumers:
            consumer(site)
    peaks = meter.peaks | {
        "attention_input": float(statistics["qkv"].absmax.max()),
        "mlp_input": float(statistics["gate_up"].absmax.max()),
        "product": float(statistics["down_proj"].absmax.max()),
    }
    cache = {name: getattr(meter, name).numpy() for name in CACHE_STATISTICS}
    return LayerStatistics(sites=statistics, peaks=peaks, **cache)


def _measure_head(
    checkpoint: Checkpoint, hidden: Sequence[Tensor], picks: Sequence[Tensor], consumers: Sequence[Consumer]
) -> InputStatistics:
    inputs = _InputMeter(checkpoint.config.hidden_size)
    for states, positions in zip(hidden, picks, strict=True):
        inputs.add(streamed.final_norm(checkpoint, [states])[0], positions)
    statistics = inputs.statistics()
    if consumers:
        buffer = torch.empty(streamed.LAYER_READ_BYTES, dtype=torch.uint8)
        name = checkpoint.name_of(streamed.head_name(checkpoint))
        blocks = (block.float() for _, block in checkpoint.row_blocks(name, buffer))
        sample = _sampled_rows([checkpoint.config.vocab_size], [blocks])
        for consumer in consumers:
            consumer(Site((HEAD,), statistics, inputs.sample(), *sample))
    return statistics


def _sampled_rows(
    counts: Sequence[int], matrices: Sequence[Iterator[Tensor]]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Sample evenly spaced rows of matrices that arrive in blocks.

    Returns:
        The rows, the largest |w| per column over all rows, and the number of sampled rows per matrix.
    """
    total, start = sum(counts), 0
    wanted = torch.linspace(0, total - 1, min(total, SAMPLED_WEIGHT_ROWS), dtype=torch.float64).round().long()
    rows: list[Tensor] = []
    sampled: list[int] = []
    absmax: Tensor | None = None
    for blocks in matrices:
        before = sum(map(len, rows))
        for block in blocks:
            here = wanted[(wanted >= start) & (wanted < start + len(block))] - start
            rows.append(block[here])
            low, high = block.aminmax(dim=0)
            largest = torch.maximum(-low, high)
            absmax = largest if absmax is None else torch.maximum(absmax, largest)
            start += len(block)
        sampled.append(sum(map(len, rows)) - before)
    assert absmax is not None
    return torch.cat(rows), absmax, tuple(sampled)


class _Report(Protocol):
    def __call__(self, tokens: int) -> None: ...


class _InputMeter:
    """Collects statistics of one input, sequence by sequence."""

    def __init__(self, channels: int) -> None:
        self._absmax = torch.zeros(channels)
        self._sum_abs = torch.zeros(channels, dtype=torch.float64)
        self._sum_square = torch.zeros(channels, dtype=torch.float64)
        self._tokens = 0
        self._rows: list[Tensor] = []

    def add(self, x: Tensor, positions: Tensor) -> None:
        """Add x [S, channels]; the rows at ``positions`` are sampled."""
        size = x.abs()
        self._absmax = torch.maximum(self._absmax, size.amax(0))
        self._tokens += len(x)
        self._sum_abs += size.sum(0, dtype=torch.float64)
        self._sum_square += size.square_().sum(0, dtype=torch.float64)
        self._rows.append(x[positions])

    def sample(self) -> Tensor:
        return torch.cat(self._rows)

    def statistics(self) -> InputStatistics:
        return InputStatistics(
            absmax=self._absmax.numpy(),
            mean_abs=(self._sum_abs / self._tokens).float().numpy(),
            mean_square=(self._sum_square / self._tokens).float().numpy(),
        )


@dataclass
class _LayerMeter:
    """Observes one layer with hooks, so that the architecture needs no code for it."""

    config: Glm4Config
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    inputs: dict[str, _InputMeter] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = {site: _InputMeter(site_width(self.config, site)) for site in LAYER_SITES}
        heads = (self.config.num_key_value_heads, self.config.head_dim)
        self.key_absmax, self.key_radius, self.value_absmax = (torch.zeros(heads) for _ in range(3))

    def cache(self, keys: Tensor, values: Tensor) -> None:
        """Add rotated keys and values: [B, Hkv, S, D]."""
        sizes = keys.abs()
        self.key_absmax = torch.maximum(self.key_absmax, sizes.amax((0, 2)))
        pairs = sizes[..., : self.config.rotary_dim].unflatten(-1, (-1, 2))
        pairs.copy_(torch.linalg.vector_norm(pairs, dim=-1, keepdim=True))
        self.key_radius = torch.maximum(self.key_radius, sizes.amax((0, 2)))
        self.value_absmax = torch.maximum(self.value_absmax, values.abs().amax((0, 2)))
        self.peak("value", values)

    def peak(self, name: str, x: Tensor) -> None:
        low, high = x.aminmax()
        self.peaks[name] = max(self.peaks.get(name, 0.0), -float(low), float(high))

    @contextmanager
    def attached_to(self, layer: Glm4DecoderLayer) -> Iterator[None]:
        def listen_to(site: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
            return module.register_forward_pre_hook(
                lambda _module, inputs: self.inputs[site].add(inputs[0][0], self.positions)
            )

        def gate_and_up(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            for name, half in zip(("gate", "up"), output.chunk(2, dim=-1), strict=True):
                self.peak(name, half)

        def peak_of(name: str) -> "_Hook":
            return lambda _module, _inputs, output: self.peak(name, output)

        handles = [listen_to(site, layer.get_submodule(names[0])) for site, names in LAYER_SITES.items()]
        handles += [
            layer.mlp.gate_up_proj.register_forward_hook(gate_and_up),
            layer.self_attn.o_proj.register_forward_hook(peak_of("o_proj")),
            layer.mlp.down_proj.register_forward_hook(peak_of("down_proj")),
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _module, inputs: self.peak("residual", inputs[0])
            ),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Hook(Protocol):
    def __call__(self, _module: nn.Module, _inputs: object, output: Tensor) -> None: ...


class BlockedAttention:
    """Causal attention over whole sequences of one length, a block of queries at a time, without a cache."""

    def __init__(self, config: Glm4Config, length: int, meter: _LayerMeter | None = None) -> None:
        self.config, self.length, self.meter = config, length, meter
        self.cos, self.sin = (table[None, None] for table in rotary_tables(config, torch.arange(length)))

    def __call__(self, _layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        size, heads = self.config.head_dim, self.config.num_attention_heads
        q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (query, key, value))
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        if self.meter is not None:
            self.meter.cache(k, v)
        group = heads // self.config.num_key_value_heads
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        step = max(1, SCORES_BLOCK // (len(q) * heads * self.length))
        blocks = [self._attend(q, k, v, start, step) for start in range(0, self.length, step)]
        return torch.cat(blocks, dim=2).transpose(1, 2).flatten(-2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: int, step: int) -> Tensor:
        q, end = q[:, :, start : start + step], min(start + step, self.length)
        k, v = k[:, :, :end], v[:, :, :end]
        scores = (q @ k.transpose(2, 3)) * self.config.scale
        unseen = torch.arange(end) > torch.arange(start, end)[:, None]
        if self.meter is not None:
            self.meter.peak("scores", scores.masked_fill_(unseen, 0.0))
        return scores.masked_fill_(unseen, -math.inf).softmax(dim=-1) @ v
