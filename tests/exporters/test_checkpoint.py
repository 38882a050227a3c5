"""Checkpoint folders: what is found without reading a weight, how weights are read, and what is refused."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_edits import edit_config, edit_tensors, refusal, write_file
from checkpoints import ARCHITECTURE_OF_TASK, tiny_config, write_checkpoint
from safetensors.torch import load_file

from glm4_exporters.architecture import expected_tensors, parameter_count
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import TASKS, Glm4Config
from glm4_runtime.bundle.file_names import SAFETENSORS
from glm4_runtime.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]


def open_files():
    return set(Path("/proc/self/fd").iterdir())


# What is found


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_found_and_read(tmp_path, task, shards):
    folder = write_checkpoint(tmp_path, tiny_config(), task=task, shards=shards)
    written = {}
    for path in folder.glob("*.safetensors"):
        written |= load_file(path)
    with Checkpoint.load(str(folder)) as checkpoint:
        assert (checkpoint.task, checkpoint.folder) == (task, folder)
        assert checkpoint.prefix == ("" if task == "encoder" else "model.")
        assert checkpoint.tensors.keys() == written.keys()
        for canonical, shape in expected_tensors(checkpoint.config, task).items():
            name = checkpoint.name_of(canonical)
            header = checkpoint.tensors[name]
            assert (header.name, header.dtype, header.shape) == (name, "float32", shape)
            assert torch.equal(checkpoint.read(name), written[name])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
@pytest.mark.parametrize("task", TASKS)
def test_what_transformers_saves(tmp_path, task, shard_size, tied):
    torch.manual_seed(0)
    model = getattr(transformers, ARCHITECTURE_OF_TASK[task])(
        transformers.Glm4Config(**tiny_config(tie_word_embeddings=tied, num_labels=3))
    )
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    with Checkpoint.load(tmp_path) as checkpoint:
        assert checkpoint.task == task
        files = {header.file for header in checkpoint.tensors.values()}
        assert (len(files) > 3) == (shard_size == "60KB")
        parameters = dict(model.named_parameters())  # a tied head once
        assert checkpoint.tensors.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert torch.equal(checkpoint.read(name), parameter)
        assert parameter_count(checkpoint.config) == model.num_parameters()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types(tmp_path, dtype):
    folder = write_checkpoint(tmp_path, tiny_config(), dtype=dtype)
    with Checkpoint.load(folder) as checkpoint:
        assert {header.dtype for header in checkpoint.tensors.values()} == {dtype}
        assert checkpoint.read("model.norm.weight").dtype == getattr(torch, dtype)


def test_each_tensor_has_its_own_type(tiny):
    edit_tensors(tiny, {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)})
    with Checkpoint.load(tiny) as checkpoint:
        assert checkpoint.tensors["model.norm.weight"].dtype == "bfloat16"
        assert checkpoint.tensors["lm_head.weight"].dtype == "float32"


def test_headers_say_where_the_bytes_are(tiny):
    written = load_file(tiny / SAFETENSORS)
    with Checkpoint.load(tiny) as checkpoint:
        for name, header in checkpoint.tensors.items():
            data = header.file.read_bytes()[header.offset : header.offset + header.nbytes]
            assert data == written[name].numpy().tobytes()


def test_a_causal_lm_is_an_encoder_too(tiny):
    with Checkpoint.load(tiny, "encoder") as checkpoint:
        assert checkpoint.task == "encoder"
        assert "lm_head.weight" not in checkpoint.tensors
        assert checkpoint.name_of("model.norm.weight") == "model.norm.weight"


def test_a_task_that_the_tensors_do_not_have(tiny):
    message = refusal(tiny, "token-classification")
    assert "2 missing (score.weight, score.bias); 1 surplus (lm_head.weight)" in message
    assert "not trained for this task" in message


def test_the_task_must_come_from_somewhere(tiny):
    assert "there is no task 'chat'; the tasks are causal-lm, " in refusal(tiny, "chat")
    edit_config(tiny, architectures=None)
    assert "names no architecture" in refusal(tiny)
    assert Checkpoint.load(tiny, "causal-lm").task == "causal-lm"


def test_a_tied_head_is_the_embedding(tmp_path):
    folder = write_checkpoint(tmp_path, tiny_config(tie_word_embeddings=True))
    with Checkpoint.load(folder) as checkpoint:
        assert checkpoint.name_of("lm_head.weight") == "model.embed_tokens.weight"
        assert "lm_head.weight" not in checkpoint.tensors
    embedding = load_file(folder / SAFETENSORS)["model.embed_tokens.weight"]
    edit_tensors(folder, {"lm_head.weight": embedding.clone()})
    with Checkpoint.load(folder) as checkpoint:
        assert torch.equal(checkpoint.read("model.embed_tokens.weight"), embedding)
    edit_tensors(folder, {"lm_head.weight": embedding.index_fill(0, torch.tensor(319), 0.0)})
    with (
        Checkpoint.load(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"),
    ):
        next(checkpoint.row_blocks("model.embed_tokens.weight", torch.empty(4096, dtype=torch.uint8)))
    edit_tensors(folder, {"lm_head.weight": embedding.half()})
    assert "float16, which is not the embedding's type" in refusal(folder)


def test_side_files(tiny):
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "LICENSE", "training_args.bin"):
        (tiny / name).write_text("{}")
    assert Checkpoint.load(tiny).side_files() == {
        name: tiny / name for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json")
    }


# Quick, small and closed again


@pytest.mark.alone
def test_a_9b_loads_in_milliseconds(tmp_path):
    """All headers of a checkpoint of 18.8 GB, on a disk that holds none of it."""
    config = tiny_config(
        vocab_size=151552, hidden_size=4096, num_hidden_layers=40, num_attention_heads=32, intermediate_size=13696,
        head_dim=128, max_position_embeddings=32768,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in expected_tensors(Glm4Config.from_dict(config), "causal-lm").items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    write_file(tmp_path / SAFETENSORS, header, end)
    load = (
        "import json, pathlib, sys, time; from glm4_exporters.checkpoint import Checkpoint; start = time.perf_counter();"
        f"checkpoint = Checkpoint.load({str(tmp_path)!r}); seconds = time.perf_counter() - start;"
        "memory = pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0];"
        "modules = [m for m in ('torch', 'onnx', 'safetensors') if m in sys.modules];"
        "print(json.dumps([seconds, int(memory) * 1024, modules, sum(t.nbytes for t in checkpoint.tensors.values())]))"
    )
    path = os.pathsep.join(str(ROOT / folder) for folder in ("exporters", "runtime"))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, check=True)
    seconds, memory, modules, size = json.loads(done.stdout)
    assert size == 18_800_558_080
    assert seconds < 0.5
    assert memory < 100e6
    assert modules == []


def test_files_are_closed(sharded):
    gc.collect()  # what refused checkpoints of other tests left open
    before = open_files()
    with Checkpoint.load(sharded) as checkpoint:
        assert len(open_files() - before) == 3
    assert open_files() == before
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.read("model.norm.weight")
    checkpoint = Checkpoint.load(sharded)
    del checkpoint
    gc.collect()
    assert open_files() == before
    edit_config(sharded, num_hidden_layers=3)
    refusal(sharded)
    gc.collect()
    assert open_files() == before


# The fingerprint


def test_fingerprint_is_the_contents_and_not_the_place(tmp_path, sharded):
    fingerprint = Checkpoint.load(sharded).fingerprint()
    assert len(bytes.fromhex(fingerprint)) == 32
    moved = shutil.copytree(sharded, tmp_path / "moved" / "far")  # keeps the times of change
    assert Checkpoint.load(moved).fingerprint() == fingerprint
    (moved / "README.md").write_text("anything")
    assert Checkpoint.load(moved).fingerprint() == fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: edit_config(folder, rms_norm_eps=2e-5),
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 9}'),
        lambda folder: (folder / "generation_config.json").unlink(),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda folder: os.utime(folder / SAFETENSORS, ns=(1, 1)),
        lambda folder: edit_tensors(folder, {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}),
    ],
)
def test_fingerprint_of_a_changed_checkpoint(tiny, change):
    before = Checkpoint.load(tiny).fingerprint()
    change(tiny)
    assert Checkpoint.load(tiny).fingerprint() != before


def into_hub_cache(folder, cache, blob_of):
    """Lay a folder out as the hub's cache does, and return the snapshot."""
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in folder.iterdir():
        blob = cache / "blobs" / blob_of(path.name)
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_hub_cache_is_known_by_its_content_hashes(tmp_path, sharded):
    import hashlib

    def blob_of(name):
        return hashlib.sha256(name.encode()).hexdigest()

    one, other = (into_hub_cache(sharded, tmp_path / name, blob_of) for name in ("one", "other"))
    for i, blob in enumerate((tmp_path / "other" / "blobs").iterdir()):
        os.utime(blob, ns=(i, i))
    with Checkpoint.load(one) as checkpoint:
        assert len(checkpoint.read("model.norm.weight")) == 64
        assert Checkpoint.load(other).fingerprint() == checkpoint.fingerprint()
        changed = into_hub_cache(sharded, tmp_path / "changed", lambda name: blob_of(name + "!"))
        assert Checkpoint.load(changed).fingerprint() != checkpoint.fingerprint()


def test_a_config_of_another_architecture(tiny):
    edit_config(tiny, model_type="glm4_moe")
    assert "mixture of experts" in refusal(tiny, error=ConfigError)
