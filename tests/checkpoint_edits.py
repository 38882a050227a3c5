"""Edits that make a checkpoint wrong, and the one-line error that follows."""

import json
import os
import struct

import pytest
from safetensors.torch import load_file, save_file

from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.bundle.file_names import INDEX, SAFETENSORS
from glm4_runtime.errors import CheckpointError


def refusal(folder, task=None, error=CheckpointError):
    with pytest.raises(error) as caught:
        Checkpoint.load(folder, task)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 500
    return message


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, add=(), drop=()):
    """Rewrite the only shard with other tensors."""
    tensors = load_file(folder / SAFETENSORS) | dict(add)
    save_file({name: t for name, t in tensors.items() if name not in drop}, folder / SAFETENSORS)


def edit_index(folder, **weight_map):
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] |= {name.replace("__", "."): file for name, file in weight_map.items()}
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file is not None}
    path.write_text(json.dumps(index))


def write_file(path, header, size, *, length=None):
    """A safetensors file of ``size`` zero bytes of weights under any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
    os.truncate(path, 8 + len(text) + size)
