"""The reference model with one layer in memory at a time, for models larger than the machine's memory.

The functions take lists of float32 hidden states [1, S, H], one per sequence. Calibration, sensitivity and comparison
all walk the layers this way:

    hidden = embed_sequences(checkpoint, sequences)
    for layer in layers(checkpoint, progress):
        hidden = [layer(x, attend) for x, attend in zip(hidden, attends)]
    outputs = finish(checkpoint, hidden, progress)
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glm4_exporters.architecture import EMBEDDING, HEAD
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.eager_attention import Attention
from glm4_exporters.reference import Glm4DecoderLayer, Glm4RMSNorm, rotary_tables
from glm4_runtime.progress import Progress, silent

Outputs = npt.NDArray[np.float32]

LAYER_READ_BYTES = 64 << 20


@torch.inference_mode()
def reference_outputs(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], progress: Progress = silent
) -> list[Outputs]:
    """The reference model's outputs in float32: [positions, outputs] per sequence."""
    hidden = embed_sequences(checkpoint, sequences)
    attends = [full_attention(checkpoint.config, len(ids)) for ids in sequences]
    for layer in layers(checkpoint, progress):
        hidden = [layer(x, attend) for x, attend in zip(hidden, attends, strict=True)]
    return finish(checkpoint, hidden, progress)


def embed_sequences(checkpoint: Checkpoint, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Embeddings [1, S, H] per sequence; only the needed rows of the table are read."""
    used = sorted({i for ids in sequences for i in ids})
    rows: dict[int, Tensor] = {}
    buffer = torch.empty(LAYER_READ_BYTES, dtype=torch.uint8)
    for start, block in checkpoint.row_blocks(checkpoint.name_of(EMBEDDING), buffer):
        # Copy: a float32 row is a view into the buffer, which the next block overwrites.
        here = [i for i in used if start <= i < start + len(block)]
        rows |= {i: block[i - start].to(torch.float32, copy=True) for i in here}
    return [torch.stack([rows[i] for i in ids])[None] for ids in sequences]


def full_attention(config: Glm4Config, length: int) -> Attention:
    """Causal attention over one whole sequence, without a cache."""
    cos, sin = (table[None, None] for table in rotary_tables(config, torch.arange(length)))
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    return Attention(config, cos, sin, mask, cache=None)


def layers(checkpoint: Checkpoint, progress: Progress = silent) -> Iterator[Glm4DecoderLayer]:
    """Every layer in order, in float32. One is in memory at a time, unless the caller keeps them."""
    count = checkpoint.config.num_hidden_layers
    for index in range(count):
        progress("run the reference's layers", index, count)
        with torch.device("meta"):
            layer = Glm4DecoderLayer(checkpoint.config, index)
        for name in dict(layer.named_parameters()):
            _place(layer, name, checkpoint, f"model.layers.{index}.{name}")
        yield layer
        del layer
    progress("run the reference's layers", count, count)


def finish(checkpoint: Checkpoint, hidden: Sequence[Tensor], progress: Progress = silent) -> list[Outputs]:
    """Final norm and head: hidden states [1, S, H] to the task's outputs, [positions, outputs] per sequence."""
    states = final_norm(checkpoint, hidden)
    if checkpoint.task == "encoder":
        return [x.numpy() for x in states]
    if checkpoint.task == "sequence-classification":
        states = [x[-1:] for x in states]
    if checkpoint.task == "causal-lm":
        return _vocabulary_head(checkpoint, states, progress)
    score = checkpoint.read("score.weight").float().T
    bias = checkpoint.read("score.bias").float() if checkpoint.task == "token-classification" else 0
    return [(x @ score + bias).numpy() for x in states]


def final_norm(checkpoint: Checkpoint, hidden: Sequence[Tensor]) -> list[Tensor]:
    """[1, S, H] per sequence to normed [S, H]."""
    norm = Glm4RMSNorm(checkpoint.config.hidden_size, checkpoint.config.rms_norm_eps)
    _place(norm, "weight", checkpoint, "model.norm.weight")
    return [norm(x)[0] for x in hidden]


def head_name(checkpoint: Checkpoint) -> str:
    """The canonical name of the matrix that computes a causal LM's logits."""
    return EMBEDDING if checkpoint.config.tie_word_embeddings else HEAD


def _vocabulary_head(checkpoint: Checkpoint, states: list[Tensor], progress: Progress) -> list[Outputs]:
    """States [n, H] times the head's rows, a block of rows at a time."""
    vocab = checkpoint.config.vocab_size
    logits = [np.empty((len(x), vocab), np.float32) for x in states]
    buffer = torch.empty(LAYER_READ_BYTES, dtype=torch.uint8)
    for start, block in checkpoint.row_blocks(checkpoint.name_of(head_name(checkpoint)), buffer):
        progress("run the reference's head", start, vocab)
        rows = block.float().T
        for x, out in zip(states, logits, strict=True):
            out[:, start : start + rows.shape[1]] = (x @ rows).numpy()
    progress("run the reference's head", vocab, vocab)
    return logits


def _place(module: torch.nn.Module, name: str, checkpoint: Checkpoint, source: str) -> None:
    owner, _, leaf = name.rpartition(".")
    tensor = checkpoint.read(checkpoint.name_of(source)).float()
    setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
