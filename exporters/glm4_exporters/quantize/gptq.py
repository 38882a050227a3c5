"""GPTQ: the error of each rounded weight is compensated by the weights that are not rounded yet.

The method of "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (Frantar et al.,
2022), applied layer by layer to the model as rounded so far. So each matrix is rounded for the inputs that it will
read. Before the rounding, a least-squares correction of the matrix compensates the errors of the layers before it.

    rounded = round_matrices(checkpoint, sequences, form, smoothing, norm_bits, progress)
    rounded["model.layers.0.mlp.down_proj.weight"].rows(0, 64)    # codes and scales of 64 rows

In memory are one layer, exact and rounded, and the activations of both models at one site, for the sequences that fit
``MOST_ACTIVATION_BYTES``. The results are in temporary files.
"""

import copy
import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm4_exporters import streamed
from glm4_exporters.architecture import EMBEDDING, HEAD, LAYER_SITES, expected_tensors
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.element_types import TORCH_TYPES
from glm4_exporters.form import Form
from glm4_exporters.formats import CODES, SCALES, Encoded, Format
from glm4_exporters.formats.base import FittedFormat
from glm4_exporters.formats.base import scale_type as scale_type_of
from glm4_exporters.quantize.calibrate import BlockedAttention
from glm4_exporters.quantize.smooth import Smoothing
from glm4_exporters.reference import Glm4DecoderLayer, Glm4RMSNorm
from glm4_runtime.errors import ExportError
from glm4_runtime.progress import Progress, silent

WINDOW = 2048  # channels that compensate each other's errors; a multiple of every 4-bit block
ROUNDED_AT_ONCE = 1024  # rows of a matrix that are rounded together
MOST_ACTIVATION_BYTES = 1 << 30  # bytes of all sequences' widest activations, in both models
# Damping: shares of the mean of the second moments' diagonal, added to the diagonal. One for the error feedback, one
# for the correction. channels / tokens is added to both, so that a short text has little influence.
FEEDBACK_DAMPING, MOVE_DAMPING = 0.01, 0.05


@dataclass(frozen=True)
class Rounded:
    """The parts of a matrix: codes int8 [rows, blocks * block], scales [rows, blocks], and whole-matrix parts.

    Attributes:
        scales: float32, which NumPy has. ``rows`` gives them in ``scale_type``.
    """

    codes: Tensor
    scales: Tensor
    scale_type: torch.dtype
    files: tuple[np.memmap[Any, Any], ...] = ()  # the files that hold them
    whole: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, first: int, count: int) -> Encoded:
        part = slice(first, first + count)
        return {CODES: self.codes[part], SCALES: self.scales[part].to(self.scale_type), **self.whole}

    def set_rows(self, start: int, encoded: Encoded) -> None:
        part = slice(start, start + len(encoded[CODES]))
        self.codes[part], self.scales[part] = encoded[CODES], encoded[SCALES].float()
        self.whole.update({name: x for name, x in encoded.items() if name not in (CODES, SCALES)})

    def written(self) -> None:
        """Release the memory; it is read from the files again when needed."""
        for file in self.files:
            file.flush()
            file._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


@torch.inference_mode()
def round_matrices(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    form: Form,
    smoothing: Smoothing,
    norm_bits: Mapping[str, int],
    progress: Progress = silent,
) -> dict[str, Rounded]:
    """Round every matrix of ``form`` whose format allows GPTQ, except the embedding.

    Args:
        smoothing: factors that the weights are multiplied by first.
        norm_bits: k by the scope of each norm whose input that scales by 2^-k.

    Raises:
        ExportError: no disk space for the results.
    """
    config, scale_type = checkpoint.config, TORCH_TYPES[scale_type_of(form.activations)]
    shapes = expected_tensors(config, checkpoint.task)
    fitted = {name: each for name, each in form.formats.items() if isinstance(each, FittedFormat)}
    results = {
        n: _room(shapes[n], f, scale_type_of(form.activations))
        for n, f in fitted.items()
        if n != EMBEDDING and shapes.get(n)
    }
    _require_space(results.values())
    sequences = those_that_fit(sequences, config)
    attends = {length: BlockedAttention(config, length) for length in {len(ids) for ids in sequences}}

    exact = streamed.embed_sequences(checkpoint, sequences)
    rounded = [_as_stored(x, form.table, scale_type) for x in exact]
    for index, layer in enumerate(streamed.layers(checkpoint)):
        progress("round matrices", index, config.num_hidden_layers)
        _smooth(layer, f"model.layers.{index}.", smoothing, norm_bits)
        own = copy.deepcopy(layer)
        walks = [
            [model.sites(x, attends[x.shape[1]]) for x in states]
            for model, states in ((layer, exact), (own, rounded))
        ]
        for matrices in LAYER_SITES.values():
            moments = _Moments([next(walk) for walk in walks[0]], [next(walk) for walk in walks[1]])
            for matrix in matrices:
                name, weight = f"model.layers.{index}.{matrix}.weight", own.get_parameter(f"{matrix}.weight")
                if name in results:
                    for start, rows in moments.rounded(weight.data, fitted[name], scale_type, results[name]):
                        weight.data[start : start + len(rows)] = rows
                    results[name].written()
        exact, rounded = ([next(walk) for walk in side] for side in walks)
    if HEAD in results:
        _round_head(checkpoint, (exact, rounded), fitted[HEAD], smoothing, scale_type, results[HEAD])
    progress("round matrices", config.num_hidden_layers, config.num_hidden_layers)
    return results


def _round_head(
    checkpoint: Checkpoint,
    states: tuple[list[Tensor], list[Tensor]],
    form: FittedFormat,
    smoothing: Smoothing,
    scale_type: torch.dtype,
    result: Rounded,
) -> None:
    """Round the head, in blocks of rows."""
    assert not form.needs_largest, "the head is read in parts"
    norm = torch.from_numpy(smoothing.rows.get("model.norm.weight", np.ones(1, np.float32)))
    exact, rounded = ([x * norm for x in streamed.final_norm(checkpoint, side)] for side in states)
    moments = _Moments(exact, rounded)
    buffer = torch.empty(streamed.LAYER_READ_BYTES, dtype=torch.uint8)
    for first, block in checkpoint.row_blocks(checkpoint.name_of(HEAD), buffer):
        rows = slice(first, first + len(block))
        part = Rounded(result.codes[rows], result.scales[rows], result.scale_type)
        for _ in moments.rounded(smoothing.apply(HEAD, block, first).float(), form, scale_type, part):
            pass  # nothing reads the logits
    result.written()


class _Moments:
    """Second moments of a matrix's input, by windows of channels: within the rounded model, and between both models."""

    def __init__(self, exact: Iterable[Tensor], rounded: Iterable[Tensor]) -> None:
        self._tokens = 0
        self._windows: list[slice] = []
        self._own: list[Tensor] = []
        self._across: list[Tensor] = []
        for wanted, seen in zip(exact, rounded, strict=True):
            self._add(wanted.flatten(0, -2), seen.flatten(0, -2))
        self._factors = [_feedback(own, self._tokens) for own in self._own]
        self._moves = [
            _move(own, across, self._tokens) for own, across in zip(self._own, self._across, strict=True)
        ]

    def _add(self, wanted: Tensor, seen: Tensor) -> None:
        self._tokens += len(seen)
        if not self._windows:
            width = seen.shape[1]
            self._windows = [slice(a, min(a + WINDOW, width)) for a in range(0, width, WINDOW)]
            sizes = [window.stop - window.start for window in self._windows]
            self._own, self._across = ([torch.zeros(n, n) for n in sizes] for _ in range(2))
        for window, own, across in zip(self._windows, self._own, self._across, strict=True):
            own.addmm_(seen[:, window].T, seen[:, window])
            across.addmm_(wanted[:, window].T, seen[:, window])

    def rounded(
        self, weight: Tensor, form: FittedFormat, scale_type: torch.dtype, result: Rounded
    ) -> Iterator[tuple[int, Tensor]]:
        """Round float32 ``weight`` into ``result``. Yields the index of a first row, and the rounded values from
        there on."""
        largest = float(weight.abs().max()) if form.needs_largest else None
        for start in range(0, len(weight), ROUNDED_AT_ONCE):
            rows = weight[start : start + ROUNDED_AT_ONCE].clone()
            for window, move in zip(self._windows, self._moves, strict=True):
                rows[:, window] += rows[:, window] @ move
            encoded = self._encoded(rows, form, scale_type, largest)
            result.set_rows(start, encoded)
            yield start, form.decode(encoded, weight.shape[1])

    def _encoded(
        self, rows: Tensor, form: FittedFormat, scale_type: torch.dtype, largest: float | None
    ) -> Encoded:
        if form.bits == 8 or form.block is None:
            return form.encode(rows, scale_type, largest=largest)  # the loss is too small for feedback

        def encode(block: Tensor, importance: Tensor) -> Encoded:
            return form.encode(block, scale_type, importance=importance, largest=largest)

        parts = [
            _round_window(rows[:, window], own.diagonal(), factor, form, encode)
            for window, own, factor in zip(self._windows, self._own, self._factors, strict=True)
        ]
        return _beside(parts)


def _round_window(
    weight: Tensor,
    importance: Tensor,
    factor: Tensor,
    form: FittedFormat,
    encode: Callable[[Tensor, Tensor], Encoded],
) -> Encoded:
    """Round column by column, and spread each column's error over the later ones. ``encode`` finds a block's scales."""
    assert form.block is not None
    left, width = weight.clone(), weight.shape[1]
    parts = []
    for start in range(0, width, form.block):
        end = min(start + form.block, width)
        block, inner = left[:, start:end], factor[start:end, start:end]
        encoded = encode(block, importance[start:end])
        step = form.step(encoded)  # [rows, 1]
        errors = torch.empty_like(block)
        codes = torch.zeros(len(block), form.block, dtype=torch.int8)
        for i in range(end - start):
            code = form.nearest(block[:, i : i + 1] * (1 / step))
            errors[:, i : i + 1] = (block[:, i : i + 1] - code * step) / inner[i, i]
            block[:, i + 1 :] -= errors[:, i : i + 1] * inner[i, i + 1 :]
            codes[:, i : i + 1] = code.to(torch.int8)
        left[:, end:] -= errors @ factor[start:end, end:]
        parts.append({**encoded, CODES: codes})
    return _beside(parts)


def _beside(parts: Sequence[Encoded]) -> Encoded:
    """The parts of columns side by side."""
    return {**parts[0], **{name: torch.cat([part[name] for part in parts], 1) for name in (CODES, SCALES)}}


def _feedback(own: Tensor, tokens: int) -> Tensor:
    """The upper Cholesky factor of the inverse of the second moments."""
    lower = torch.linalg.cholesky(_damped(own, FEEDBACK_DAMPING, tokens))
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor.float()


def _move(own: Tensor, across: Tensor, tokens: int) -> Tensor:
    """Least-squares M so that (W + W·M)·x_rounded ≈ W·x_exact."""
    difference = across.double() - own.double()
    move: Tensor = torch.linalg.solve(_damped(own, MOVE_DAMPING, tokens), difference.T).T
    return move.float()


def _damped(own: Tensor, share: float, tokens: int) -> Tensor:
    wide = own.double()
    share += len(own) / tokens
    wide.diagonal().add_(max(share * float(wide.diagonal().mean()), 1e-30))
    return wide


def _as_stored(x: Tensor, form: Format | None, scale_type: torch.dtype) -> Tensor:
    """Embeddings [1, S, H], as the stored table returns them."""
    return x.clone() if form is None else form.decode(form.encode(x[0], scale_type), x.shape[2])[None]


def _smooth(layer: Glm4DecoderLayer, scope: str, smoothing: Smoothing, norm_bits: Mapping[str, int]) -> None:
    for name, parameter in layer.named_parameters():
        parameter.data = smoothing.apply(scope + name, parameter.data, 0)
    for name, module in layer.named_modules():
        if isinstance(module, Glm4RMSNorm):
            module.eps *= 2.0 ** (-2 * norm_bits.get(scope + name, 0))


def those_that_fit(sequences: Sequence[Sequence[int]], config: Glm4Config) -> list[Sequence[int]]:
    """The first sequences that fit ``MOST_ACTIVATION_BYTES``; at least one."""
    ends = np.cumsum([len(ids) for ids in sequences]) * 2 * 4 * config.intermediate_size
    return list(sequences[: max(1, int((ends <= MOST_ACTIVATION_BYTES).sum()))])


def _require_space(results: Iterable[Rounded]) -> None:
    """Check the disk space before the work; the files are sparse until they are written."""
    needed = sum(r.codes.numel() + 4 * r.scales.numel() for r in results)
    folder = tempfile.gettempdir()
    if needed > (free := shutil.disk_usage(folder).free):
        raise ExportError(
            f"calibrating 4-bit matrices takes {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f}; "
            "make room, or set TMPDIR"
        )


def _room(shape: Sequence[int], form: FittedFormat, scale_type: str) -> Rounded:
    """Tensors in temporary files, which are deleted with them."""
    rows, width = shape
    with tempfile.TemporaryFile() as codes, tempfile.TemporaryFile() as scales:
        files = (
            np.memmap(codes, np.int8, "w+", shape=(rows, form.stored_width(width))),
            np.memmap(scales, np.float32, "w+", shape=(rows, form.blocks(width))),
        )
        stored = TORCH_TYPES[form.parts(rows, width, scale_type)[SCALES].dtype]
        return Rounded(torch.from_numpy(files[0]), torch.from_numpy(files[1]), stored, files)
