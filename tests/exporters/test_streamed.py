"""The reference a layer at a time, against the reference whole."""

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint

from glm4_exporters import streamed
from glm4_exporters.checkpoint import Checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_from_a_table_in_many_blocks(tmp_path, monkeypatch, dtype):
    """A float32 row must not stay a view into the buffer, which the next block overwrites."""
    monkeypatch.setattr(streamed, "LAYER_READ_BYTES", 64 * 4 * 50)
    checkpoint = Checkpoint.load(write_checkpoint(tmp_path, tiny_config(), dtype=dtype))
    table = checkpoint.read("model.embed_tokens.weight").float()
    sequences = [[0, 319, 7], [49, 50, 7]]
    for ids, found in zip(sequences, streamed.embed_sequences(checkpoint, sequences), strict=True):
        assert torch.equal(found[0], table[ids])
