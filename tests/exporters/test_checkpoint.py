"""Checkpoint folders: what is found without reading a weight, how weights are read, and what is refused."""

import gc
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import transformers
from checkpoints import ARCHITECTURE_OF_TASK, tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file

from glm4_exporters.architecture import expected_tensors, parameter_count
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import TASKS, Glm4Config
from glm4_runtime.bundle.file_names import INDEX, SAFETENSORS
from glm4_runtime.errors import CheckpointError, ConfigError

Q_BIAS = "model.layers.1.self_attn.q_proj.bias"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(tmp_path):
    return write_checkpoint(tmp_path / "tiny", tiny_config())


@pytest.fixture
def sharded(tmp_path):
    return write_checkpoint(tmp_path / "sharded", tiny_config(), shards=3)


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


def test_known_harmless_tensors_are_ignored(tiny):
    edit_tensors(
        tiny,
        {
            "model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
    )
    assert len(Checkpoint.load(tiny).tensors) == 29


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


def test_a_config_of_another_architecture(tiny):
    edit_config(tiny, model_type="glm4_moe")
    assert "mixture of experts" in refusal(tiny, error=ConfigError)


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


# Tensors that do not agree with the configuration


@pytest.mark.parametrize(
    ("changes", "found", "cause"),
    [
        ({"attention_bias": False}, "6 surplus", "attention_bias in config.json is false"),
        ({"num_hidden_layers": 3}, "13 missing (model.layers.2.input_layernorm.weight", "is larger than the weights'"),
        ({"num_hidden_layers": 1}, "13 surplus", "num_hidden_layers in config.json is smaller"),
        ({"num_key_value_heads": 1}, "8 misshapen (model.layers.0.self_attn.k_proj.weight [32, 64] instead of [16, 64]",
         "num_key_value_heads or head_dim"),
        ({"vocab_size": 300}, "2 misshapen", "vocab_size or hidden_size"),
        ({"intermediate_size": 100}, "mlp.gate_up_proj.weight [192, 64] instead of [200, 64]", "intermediate_size"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_the_weights(tiny, changes, found, cause):
    edit_config(tiny, **changes)
    message = refusal(tiny)
    assert found in message
    assert cause in message


def test_everything_wrong_is_said_at_once(tiny):
    edit_tensors(
        tiny,
        add={
            "model.norm.weight": torch.ones(63),
            "lm_head.weight": torch.ones(320, 64, dtype=torch.int8),
            "model.layers.0.extra.weight": torch.ones(2),
        },
        drop={Q_BIAS},
    )
    message = refusal(tiny)
    assert f"1 missing ({Q_BIAS}); 1 surplus (model.layers.0.extra.weight); " in message
    assert (
        "1 misshapen (model.norm.weight [63] instead of [64]); 1 wrong dtype (lm_head.weight I8)" in message
    )


def test_long_lists_are_counted(tiny):
    edit_tensors(tiny, add={f"x.{i:02}": torch.ones(1) for i in range(50)})
    assert "50 surplus (x.00, x.01, x.02, x.03, and 46 more)" in refusal(tiny)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("model.layers.0.mlp.down_proj.weight_scale", "quantized"),
        ("model.layers.0.mlp.gate_proj.weight", "another architecture"),
        ("model.layers.0.mlp.experts.0.down_proj.weight", "mixture of experts"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "adapter"),
    ],
)
def test_likely_causes_of_a_surplus(tiny, name, cause):
    edit_tensors(tiny, add={name: torch.ones(1)})
    assert cause in refusal(tiny)


@pytest.mark.parametrize(
    "wrapper", ["module.", "base_model.model.", "_orig_mod.", "module.base_model.model."]
)
def test_a_wrapper_around_all_names_is_named(tiny, wrapper):
    """As training libraries save it; the weights inside are right, whatever config.json says of biases."""
    path = tiny / SAFETENSORS
    save_file({wrapper + name: tensor for name, tensor in load_file(path).items()}, path)
    assert f"likely cause: all names begin with {wrapper!r}, a training wrapper's; save the" in refusal(tiny)


@pytest.mark.parametrize(
    "name", ["base_model.model.lm_head.modules_to_save.default.weight", "lm_head.original_module.weight",
             "model.layers.0.self_attn.q_proj.base_layer.weight"],
)  # fmt: skip
def test_what_peft_leaves_in_the_names_is_an_adapter(tiny, name):
    edit_tensors(tiny, add={name: torch.ones(1)})
    assert "likely cause: an adapter is not merged into the weights; merge it" in refusal(tiny)


def test_missing_biases(tiny):
    names = [name for name in load_file(tiny / SAFETENSORS) if name.endswith("bias")]
    edit_tensors(tiny, drop=names)
    assert "attention_bias in config.json is true, but the weights have no biases" in refusal(tiny)


def test_an_output_projection_has_no_bias(tiny):
    edit_tensors(tiny, add={"model.layers.0.self_attn.o_proj.bias": torch.zeros(64)})
    assert "1 surplus (model.layers.0.self_attn.o_proj.bias)" in refusal(tiny)


def test_an_untied_model_without_a_head(tiny):
    edit_tensors(tiny, drop={"lm_head.weight"})
    message = refusal(tiny)
    assert "1 missing (lm_head.weight)" in message
    assert "tie_word_embeddings" in message


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


# Files that are damaged


def write_file(path, header, size, *, length=None):
    """A safetensors file of ``size`` zero bytes of weights under any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
    os.truncate(path, 8 + len(text) + size)


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size", "reason"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, '"b" begins at 4, but the tensor before it ends at 8'),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, '"b" begins at 12, but the tensor before it ends at 8'),
        ({"a": entry(4, 12)}, 12, '"a" begins at 4'),
        ({"a": entry(0, 8)}, 7, "has 7 bytes of weights, its header says 8"),
        ({"a": entry(0, 8)}, 9, "has 9 bytes of weights, its header says 8"),
        ({"a": entry(8, 0)}, 8, "not a begin and an end"),
        ({"a": entry(-8, 0)}, 8, "not a list of at most 8 sizes"),
        ({"a": entry(0, 8.0)}, 8, "not a list of at most 8 sizes"),
        ({"a": entry(0, 8, shape=[True])}, 8, "has the shape [true]"),
        ({"a": entry(0, 8, shape=[3])}, 8, "takes 8 bytes, but F32 [3] takes 12"),
        ({"a": entry(0, 8, shape=[2**62])}, 8, f"takes 8 bytes, but F32 [{2**62}] takes {2**64}"),
        ({"a": entry(0, 8, shape=[2**62] * 8)}, 8, "takes 8 bytes, but F32 [4611686018427387904, "),
        ({"a": entry(0, 8, shape=[2**70])}, 8, "not a list of at most 8 sizes"),
        ({"a": entry(0, 8, shape=[2**62] * 300)}, 8, "not a list of at most 8 sizes"),
        ({"a": entry(0, 8, shape=[10**18] * 20_000)}, 8, "not a list of at most 8 sizes"),
        ({"a": entry(0, 8, shape=[1] * 1_000_000)}, 8, "has the shape [1, 1, 1, "),
        ({"a": entry(0, 8, shape=[10**4000])}, 8, "has the shape [1000000000"),
        ({"a": entry(0, 10**4000)}, 8, "has the data_offsets [0, 1000000000"),
        ({"x" * 1_000_000: entry(0, 8)}, 8, "has a name of 1000000 characters, but at most 500 are read"),
        ({"layers.1." * 100_000: entry(0, 8)}, 8, "has a name of 900000 characters"),
        ({"a": entry(0, 8, dtype="F" * 1_000_000)}, 8, 'has the unknown dtype "FFFF'),
        ({"a": [[[[]]]] * 100_000}, 8, "has not exactly a dtype"),
        (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", 8, "nested more than 100 levels deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 8, "no JSON"),
        (b'{"a\\ud800": 1}', 8, "no JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", 8, "no JSON"),
        ({"a": entry(0, 8, dtype="F33")}, 8, 'the unknown dtype "F33"'),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "the unknown dtype"),
        ({"a": entry(0, 8) | {"data_offsets": [0, 4, 8]}}, 8, "not a begin and an end"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "not exactly a dtype"),
        ({"a": 5}, 8, "not exactly a dtype"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', 4, '"a" is there twice'),
        (b"{\xff}", 0, "no JSON"),
        (b"[]", 0, "must hold a JSON object"),
        (b"", 0, "no JSON"),
    ],
)  # fmt: skip
def test_damaged_headers(tiny, header, size, reason):
    write_file(tiny / SAFETENSORS, header, size)
    message = refusal(tiny)
    assert str(tiny / SAFETENSORS) in message
    assert reason in message


@pytest.mark.parametrize("twice", [False, True])
def test_a_header_of_300000_tensors_is_refused_in_seconds(tiny, twice):
    """A duplicate was looked for in all keys before it: 30 s."""
    entries = [f'"layers.{i}.x": {json.dumps(entry(8 * i, 8 * i + 8))}' for i in range(300_000)]
    header = "{" + ", ".join(entries + entries[-1:] * twice) + "}"
    write_file(tiny / SAFETENSORS, header.encode(), 8 * 300_000)
    began = time.process_time()
    message = refusal(tiny)
    assert time.process_time() - began < 15
    assert ('"layers.299999.x" is there twice' if twice else "300000 surplus (layers.0.x, ") in message


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


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut short or no safetensors file (0 bytes)"),
        (b"\1\0\0\0\0\0\0", "(7 bytes)"),
        (struct.pack("<Q", 2**63) + b"{}", "cut short"),
        (struct.pack("<Q", 3) + b"{}", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "run: git lfs pull"),
    ],
)
def test_damaged_beginnings(tiny, data, reason):
    (tiny / SAFETENSORS).write_bytes(data)
    assert reason in refusal(tiny)


def test_a_header_that_is_too_large(tiny):
    write_file(tiny / SAFETENSORS, b"{", 200_000_000, length=100_000_001)
    assert f"has a header of 100000001 bytes, but at most {32 << 20} are read" in refusal(tiny)


def test_a_half_downloaded_file(tiny):
    os.truncate(tiny / SAFETENSORS, (tiny / SAFETENSORS).stat().st_size // 2)
    assert "download it again" in refusal(tiny)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 3500), st.binary(min_size=1, max_size=3)), min_size=1, max_size=3)
)
def test_any_damage_to_a_header_is_refused_in_one_line(tiny, damages):
    path = tiny / SAFETENSORS
    data = bytearray(path.read_bytes())
    for at, noise in damages:
        data[at : at + len(noise)] = noise
    (tiny.parent / "damaged").mkdir(exist_ok=True)
    damaged = tiny.parent / "damaged"
    shutil.copyfile(tiny / "config.json", damaged / "config.json")
    (damaged / SAFETENSORS).write_bytes(data)
    try:
        checkpoint = Checkpoint.load(damaged)
    except CheckpointError as error:
        assert str(error).isprintable()  # noqa: PT017  it may also be read
    else:  # the noise fell on the weights, or on what nobody reads
        assert len(checkpoint.tensors) == 29


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("direct", [True, False])
def test_row_blocks_past_the_page_cache_are_the_tensor(tmp_path, monkeypatch, count, direct):
    """Buffers that begin at a page, tensors that do not; with and without a file system that can."""
    import mmap

    from glm4_exporters import safetensors_file as module

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


def test_weights_that_are_a_file_of_the_system(tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path.parent / f"{tmp_path.name}-linked")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: "):
        Checkpoint.load(folder)
