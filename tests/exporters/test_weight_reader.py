"""Weights read whole and in blocks, and files that change in between."""

import os
import struct

import pytest
import torch
from checkpoint_edits import edit_tensors
from checkpoints import tiny_config, write_checkpoint
from safetensors.torch import load_file

from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.bundle.file_names import SAFETENSORS
from glm4_runtime.errors import CheckpointError

# Reading


@pytest.mark.parametrize("size", [256, 1000, 4096, 1 << 20])
def test_row_blocks_are_the_tensor(tmp_path, size):
    folder = write_checkpoint(tmp_path, tiny_config(), dtype="bfloat16")
    buffer = torch.empty(size, dtype=torch.uint8)
    with Checkpoint.load(folder) as checkpoint:
        for name, header in checkpoint.tensors.items():
            rows = 0
            whole = checkpoint.read(name)
            for first, block in checkpoint.row_blocks(name, buffer):
                assert first == rows
                assert block.untyped_storage().data_ptr() == buffer.data_ptr()
                assert torch.equal(block, whole[first : first + len(block)])
                rows += len(block)
                last = rows == header.shape[0]
                assert last or (len(block) + 1) * whole[0].nbytes > size  # as many as fit
            assert last


def test_a_row_must_fit(tiny):
    with (
        Checkpoint.load(tiny) as checkpoint,
        pytest.raises(CheckpointError, match=r"a row of lm_head\.weight takes 256 bytes, the buffer has 255"),
    ):
        next(checkpoint.row_blocks("lm_head.weight", torch.empty(255, dtype=torch.uint8)))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_that_are_not_finite(tmp_path, dtype, value):
    folder = write_checkpoint(tmp_path, tiny_config(), dtype=dtype)
    weight = load_file(folder / SAFETENSORS)["lm_head.weight"]
    weight[300, 7] = weight[310, 2] = float(value)
    edit_tensors(folder, {"lm_head.weight": weight})
    reason = rf"model\.safetensors: lm_head\.weight\[300, 7\] is {value};"
    with Checkpoint.load(folder) as checkpoint:
        with pytest.raises(CheckpointError, match=reason):
            checkpoint.read("lm_head.weight")
        with pytest.raises(CheckpointError, match=reason):
            list(checkpoint.row_blocks("lm_head.weight", torch.empty(3000, dtype=torch.uint8)))


def test_a_file_that_is_cut_short_later(tiny):
    with Checkpoint.load(tiny) as checkpoint:
        os.truncate(tiny / SAFETENSORS, (tiny / SAFETENSORS).stat().st_size - 1000)
        last = max(checkpoint.tensors.values(), key=lambda header: header.offset)
        with pytest.raises(CheckpointError, match="cut short after it was opened"):
            checkpoint.read(last.name)


def test_a_file_that_changes_later(tiny):
    with Checkpoint.load(tiny) as checkpoint:
        with (tiny / SAFETENSORS).open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(struct.pack("<f", 7.0))
        os.utime(tiny / SAFETENSORS, ns=(0, 0))
        with pytest.raises(CheckpointError, match="changed while it was read"):
            checkpoint.read("model.norm.weight")


def test_a_file_that_is_replaced_later_is_still_the_old_one(tiny):
    with Checkpoint.load(tiny) as checkpoint:
        before = checkpoint.read("lm_head.weight")
        other = write_checkpoint(tiny.parent / "other", tiny_config(), seed=1)
        (other / SAFETENSORS).replace(tiny / SAFETENSORS)
        assert torch.equal(checkpoint.read("lm_head.weight"), before)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("direct", [True, False])
def test_row_blocks_past_the_page_cache_are_the_tensor(tmp_path, monkeypatch, count, direct):
    """Buffers that begin at a page, tensors that do not; with and without a file system that can."""
    import mmap

    from glm4_runtime.bundle import safetensors_file as module

    if not direct:
        monkeypatch.setattr(module, "_open_direct", lambda _fd: -1)
    folder = write_checkpoint(
        tmp_path / "c", tiny_config(vocab_size=3001, hidden_size=200), dtype="bfloat16", shards=2
    )
    buffers = [torch.frombuffer(mmap.mmap(-1, 1 << 18), dtype=torch.uint8) for _ in range(count)]
    with Checkpoint.load(folder) as checkpoint:
        for name, header in checkpoint.tensors.items():
            blocks = []
            for first, block in checkpoint.row_blocks(name, *buffers):
                assert first == sum(len(b) for b in blocks)
                blocks.append(block.clone())
            whole = checkpoint.read(name)
            assert torch.equal(torch.cat(blocks), whole)
            if header.shape == (3001, 200):
                # 634 rows of 400 bytes leave two pages; of them whole panels of 64
                assert [len(block) for block in blocks] == [576] * 5 + [121]
