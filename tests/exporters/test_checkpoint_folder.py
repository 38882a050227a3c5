"""The files of a checkpoint folder, and an index that does not agree with them."""

import json

import pytest
import torch
from checkpoint_edits import edit_index, refusal
from safetensors.torch import load_file, save_file

from glm4_runtime.bundle.file_names import INDEX, SAFETENSORS

# Folders that are refused


def test_no_checkpoint_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "first: hf download zai-org/GLM-4-9B-0414" in refusal("zai-org/GLM-4-9B-0414")
    assert refusal("/nowhere/to/be/found") == "there is no folder /nowhere/to/be/found"
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "it is an adapter" in refusal(tmp_path)


def test_a_file_instead_of_a_folder(tiny):
    assert "is a file; give the folder" in refusal(tiny / SAFETENSORS)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is pickled"),
        ("pytorch_model-00001-of-00002.bin", "save_pretrained"),
        ("consolidated.00.pth", "is pickled"),
        ("model.pt", "is pickled"),
        ("model-00001-of-00004.safetensors", "download that file too"),
        ("adapter_model.safetensors", "merge it"),
        ("model-Q4_K_M.gguf", "GGUF"),
        ("notes.txt", "finish the download"),
    ],
)
def test_other_weights(tiny, name, advice):
    (tiny / SAFETENSORS).rename(tiny / name)
    message = refusal(tiny)
    assert "has neither model.safetensors nor model.safetensors.index.json" in message
    assert advice in message


def test_stale_weights_beside_an_index(sharded):
    save_file({"x": torch.ones(1)}, sharded / SAFETENSORS)
    assert "remove the one that is out of date" in refusal(sharded)


# An index that does not agree with its shards


def test_a_shard_that_is_not_here(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = refusal(sharded)
    assert "lacks model-00002-of-00003.safetensors of the 3 files" in message
    assert "finish the download" in message


def test_a_link_that_leads_nowhere(sharded):
    path = sharded / "model-00002-of-00003.safetensors"
    path.unlink()
    path.symlink_to("../../blobs/gone")
    assert "lacks model-00002-of-00003.safetensors" in refusal(sharded)


def test_a_tensor_that_its_shard_lacks(sharded):
    edit_index(sharded, model__norm__weight="model-00001-of-00003.safetensors")
    assert "1 in the index but not in its file (model.norm.weight)" in refusal(sharded)


def test_a_tensor_that_the_index_lacks(sharded):
    edit_index(sharded, model__norm__weight=None)
    assert "1 in a file but not in the index (model.norm.weight)" in refusal(sharded)


def test_a_tensor_in_two_shards(sharded):
    path = sharded / "model-00001-of-00003.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.ones(64)}, path)
    assert "1 in two files (model.norm.weight)" in refusal(sharded)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "..", ".", "", "x\0y", 3]
)
def test_an_index_that_leads_elsewhere(sharded, name):
    edit_index(sharded, model__norm__weight=name)
    assert "only files beside it are read" in refusal(sharded)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": null}']
)
def test_a_damaged_index(sharded, text):
    (sharded / INDEX).write_text(text)
    assert INDEX in refusal(sharded)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"x" * 1_000_000: "a.safetensors"},
        {"a": "x" * 1_000_000},
        {"a": ["x" * 1_000_000]},
        {"a\ud800": "a.safetensors"},
        {str(i): f"{i}.safetensors" for i in range(100_000)},
    ],
    ids=["long name", "long file", "long value", "half a character", "many"],
)
def test_an_index_of_strange_names_is_refused_in_one_line(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert INDEX in refusal(sharded)
