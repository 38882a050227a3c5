"""How much quantizing each matrix alone changes a causal LM's output, measured in one walk over the layers.

    losses = measure(checkpoint, sequences, quantize_dequantize, progress=progress)

For each matrix, a stream of hidden states with this matrix quantized starts at its layer and runs through the rest of
the model. One layer's weights are in memory, and all streams pass through them. The streams are in a temporary file.
The head runs in blocks of rows, and each block adds its part of the KL divergence from the exact model. So no full row
of logits is in memory.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glm4_exporters import streamed
from glm4_exporters.architecture import EMBEDDING, HEAD, expected_tensors
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.quantize.calibrate import BlockedAttention
from glm4_exporters.reference import Glm4DecoderLayer
from glm4_runtime.errors import ExportError
from glm4_runtime.progress import Progress, silent

TOKENS_AT_ONCE = 512  # enough rows to make reading the weights worthwhile
ROW_BLOCK = 16 << 20  # elements of a matrix that are quantized at a time

# (name, rows) -> the rows after quantizing and dequantizing.
RoundTrip = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class TensorLoss:
    """The loss from quantizing one matrix alone: mean KL divergence of the model's output, in nats per token."""

    name: str
    kl: float
    elements: int

    @property
    def kl_per_element(self) -> float:
        return self.kl / self.elements


@torch.inference_mode()
def measure(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    quantize_dequantize: RoundTrip,
    progress: Progress = silent,
) -> list[TensorLoss]:
    """Every matrix's loss; the largest loss per element first.

    A tied head is the embedding, and quantized with it.

    Raises:
        ExportError: another task than causal-lm, or no room for the streams.
    """
    names = _matrices(checkpoint)
    streams = _Streams(checkpoint, sequences, names, quantize_dequantize)
    streams.walk(progress)
    divergences = streams.divergences(progress)
    shapes = expected_tensors(checkpoint.config, checkpoint.task)
    losses = [TensorLoss(name, kl, int(np.prod(shapes[name]))) for name, kl in divergences.items()]
    return sorted(losses, key=lambda loss: -loss.kl_per_element)


def require_distributions(checkpoint: Checkpoint) -> None:
    """Refuse another task than causal-lm.

    Raises:
        ExportError: naming the task.
    """
    if checkpoint.task != "causal-lm":
        raise ExportError(
            f"sensitivity compares next-token distributions, which a {checkpoint.task} checkpoint has none of; "
            "rank the causal LM that it was made from"
        )


def _matrices(checkpoint: Checkpoint) -> list[str]:
    require_distributions(checkpoint)
    shapes = expected_tensors(checkpoint.config, checkpoint.task)
    return [name for name, shape in shapes.items() if len(shape) == 2]


class _Streams:
    """Hidden states [1 + matrices, tokens, H] of the clean model and of one model per matrix."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: Sequence[Sequence[int]],
        names: list[str],
        quantize_dequantize: RoundTrip,
    ) -> None:
        self.checkpoint, self.quantize = checkpoint, quantize_dequantize
        self.lengths = [len(ids) for ids in sequences]
        self.row = {name: i for i, name in enumerate(names, 1) if name != HEAD}  # the head's is the clean one
        self.states = _temporary((1 + len(self.row), sum(self.lengths), checkpoint.config.hidden_size))
        clean = torch.cat([x[0] for x in streamed.embed_sequences(checkpoint, sequences)])
        self.states[0] = clean
        self.states[self.row[EMBEDDING]] = quantize_dequantize(EMBEDDING, clean)
        self.attends = {length: BlockedAttention(checkpoint.config, length) for length in set(self.lengths)}

    def walk(self, progress: Progress) -> None:
        """Run every stream through the layers; a matrix's stream starts in the matrix's layer."""
        count = self.checkpoint.config.num_hidden_layers
        started = 2
        work, done = count * started + len(self.row) * (count + 1) // 2, 0
        layers = streamed.layers(self.checkpoint)
        for index in range(count):
            progress("rank tensors", done, work)
            done += self._pass(next(layers), index, started)
            started += sum(name.startswith(f"model.layers.{index}.") for name in self.row)
        progress("rank tensors", work, work)

    def _pass(self, layer: Glm4DecoderLayer, index: int, started: int) -> int:
        """Run one layer; returns how many streams passed or started."""
        clean = self.states[0].clone()
        self._run(layer, self.states[:started])
        fresh = [name for name in self.row if name.startswith(f"model.layers.{index}.")]
        for name in fresh:
            parameter = layer.get_parameter(name.removeprefix(f"model.layers.{index}."))
            kept, parameter.data = parameter.data, self._quantized(name, parameter.data)
            state = self.states[self.row[name]]
            state.copy_(clean)
            self._run(layer, state[None])
            parameter.data = kept
        return started + len(fresh)

    def _quantized(self, name: str, weight: Tensor) -> Tensor:
        result = torch.empty_like(weight)
        step = max(1, ROW_BLOCK // weight.shape[1])
        for start in range(0, len(weight), step):
            result[start : start + step] = self.quantize(name, weight[start : start + step])
        return result

    def _run(self, layer: Glm4DecoderLayer, states: Tensor) -> None:
        """states [streams, tokens, H] through the layer, in place, some streams of a sequence at a time."""
        for start, length in self._sequences():
            for part in states.split(max(1, TOKENS_AT_ONCE // length)):
                piece = part[:, start : start + length]
                piece.copy_(layer(piece, self.attends[length]))

    def _sequences(self) -> Iterator[tuple[int, int]]:
        start = 0
        for length in self.lengths:
            yield start, length
            start += length

    def divergences(self, progress: Progress) -> dict[str, float]:
        """Mean KL divergence of each matrix's model from the clean one."""
        checkpoint, vocab = self.checkpoint, self.checkpoint.config.vocab_size
        head = streamed.head_name(checkpoint)
        for state in self.states:
            state.copy_(streamed.final_norm(checkpoint, [state[None]])[0])
        rows = self.row | ({HEAD: 0} if head == HEAD else {})
        sums = {name: _Divergence(self.states.shape[1]) for name in rows}
        buffer = torch.empty(streamed.LAYER_READ_BYTES, dtype=torch.uint8)
        for start, block in checkpoint.row_blocks(checkpoint.name_of(head), buffer):
            progress("compare distributions", start, vocab)
            weights = block.float().T
            perturbed = self.quantize(head, block.float()).T
            clean = self.states[0] @ weights
            for name, row in rows.items():
                sums[name].add(clean, self.states[row] @ (perturbed if name == head else weights))
        progress("compare distributions", vocab, vocab)
        return {name: total.mean() for name, total in sums.items()}


class _Divergence:
    """KL(p || q) per token, when the logits come in blocks of the vocabulary.

    With d = log q - log p up to a constant, KL = log E[e^d] - E[d] under p. The sums of e^(p's logit - largest so
    far) are float64, because the first order of d cancels and a small difference remains.
    """

    def __init__(self, tokens: int) -> None:
        self._largest = torch.full((tokens, 1), -torch.inf, dtype=torch.float64)
        self._sums = torch.zeros(3, tokens, dtype=torch.float64)  # of 1, d and e^d - 1

    def add(self, clean: Tensor, perturbed: Tensor) -> None:
        """Logits [tokens, block] of both."""
        wide = clean.double()
        largest = torch.maximum(self._largest, wide.amax(1, keepdim=True))
        weight, d = (wide - largest).exp(), perturbed.double() - wide
        new = torch.stack([weight.sum(1), (weight * d).sum(1), (weight * d.expm1()).sum(1)])
        self._sums = self._sums * (self._largest - largest).exp()[:, 0] + new
        self._largest = largest

    def mean(self) -> float:
        total, first, exponential = self._sums
        return float(((exponential / total).log1p() - first / total).mean())


def _temporary(shape: tuple[int, int, int]) -> Tensor:
    """A float32 tensor in a temporary file, deleted with the tensor; the page cache holds the parts in use."""
    needed, folder = 4 * int(np.prod(shape)), tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"the hidden states of {shape[0]} models take {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f}; "
            "give less text, or set TMPDIR"
        )
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
