"""The data file: every byte as torch casts it, at its offset, whatever the size of the buffers."""

import errno
import hashlib
import os

import onnx_ir as ir
import pytest
import torch
from checkpoints import random_tensors, tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file

from glm4_exporters import aligned_file, weights
from glm4_exporters.architecture import expected_tensors
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.element_types import TORCH_TYPES, ir_type
from glm4_exporters.trace import ROTARY_COS, ROTARY_SIN, trace
from glm4_runtime.errors import CheckpointError, ExportError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IR_TYPES = {kind: ir_type(name) for name, kind in TORCH_TYPES.items()}


def model_of(checkpoint, dtype=torch.float32):
    """A graph that has the initializers of a traced one, and nothing else."""
    config = checkpoint.config
    table = (config.max_position_embeddings, config.rotary_dim // 2)
    shapes = expected_tensors(config, checkpoint.task) | {ROTARY_COS: table, ROTARY_SIN: table}
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24})
    for name, shape in shapes.items():
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(IR_TYPES[dtype]), shape=ir.Shape(shape)
        )
    return ir.Model(graph, ir_version=11)


def written(folder, path, dtype=torch.float32):
    """Stream a checkpoint into ``path``; returns the layout and what was said of the file."""
    with Checkpoint.load(folder) as checkpoint:
        tensors = weights.layout(model_of(checkpoint, dtype))
        return tensors, weights.write_weights(checkpoint, tensors, path)


def stored(path, tensor):
    data = bytearray(path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes])
    return torch.frombuffer(data, dtype=TORCH_TYPES[tensor.type_name]).reshape(tensor.shape)


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def with_tensor(folder, name, change):
    """Change one tensor of a checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_every_weight_is_torchs_cast_bit_for_bit(tmp_path, source, target):
    folder = write_checkpoint(
        tmp_path / "checkpoint", tiny_config(), dtype=str(DTYPES[source]).removeprefix("torch.")
    )

    def awkward(tensor):  # subnormals, ties between two roundings, both zeros, the largest of fp16
        values = [6e-8, 3e-8, -5.9e-8, 2049.0, 1 + 2**-9, 1 + 2**-12, 65504.0, -65504.0, 0.0, -0.0, 6e-6]
        kept = torch.tensor(values).to(tensor.dtype)
        tensor[0, : len(kept)] = torch.where(kept.float().abs() <= 65504, kept, 1.0)  # 65504 is 65536 in bf16

    with_tensor(folder, "model.layers.1.mlp.down_proj.weight", awkward)
    tensors, _ = written(folder, tmp_path / "data", DTYPES[target])
    original = load_file(folder / "model.safetensors")
    compared = [t for t in tensors if t.name in original]
    assert len(compared) == len(original)
    for tensor in compared:
        assert same_bits(stored(tmp_path / "data", tensor), original[tensor.name].to(DTYPES[target]))


def test_tensors_lie_apart_at_multiples_of_4096_and_zeros_between(tmp_path, tiny_checkpoint):
    tensors, said = written(tiny_checkpoint, tmp_path / "data", torch.float16)
    data = (tmp_path / "data").read_bytes()
    ends = [0] + [t.offset + t.nbytes for t in tensors]
    for tensor, before in zip(tensors, ends, strict=False):
        assert tensor.offset % 4096 == 0
        assert 0 <= tensor.offset - before < 4096
        assert not any(data[before : tensor.offset])
    assert said.files[0].bytes == len(data) == weights.stored_bytes(tensors)
    assert len(data) % 4096 == 0


def test_the_sha256_is_the_files(tmp_path, tiny_checkpoint):
    _, said = written(tiny_checkpoint, tmp_path / "data")
    assert said.files[0].sha256 == hashlib.sha256((tmp_path / "data").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("read_block", "write_block"), [(1000, 4096), (64 << 20, 8192), (5000, 12288), (400, 32 << 20)]
)
def test_buffers_of_any_size_write_the_same_file(
    tmp_path, tiny_checkpoint, monkeypatch, read_block, write_block
):
    """The embedding takes 80 KiB here: rows straddle every boundary of the small buffers."""
    _, whole = written(tiny_checkpoint, tmp_path / "whole", torch.bfloat16)
    monkeypatch.setattr(weights, "READ_BUFFER_BYTES", read_block)
    monkeypatch.setattr(aligned_file, "WRITE_BLOCK", write_block)
    _, parts = written(tiny_checkpoint, tmp_path / "parts", torch.bfloat16)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert parts == whole


def test_a_real_buffer_boundary_is_crossed(tmp_path):
    """Nothing is patched: the embedding of 40 MB is read in one block and written in two."""
    config = tiny_config(vocab_size=160_001, num_hidden_layers=1)
    folder = write_checkpoint(tmp_path / "checkpoint", config)
    tensors, said = written(folder, tmp_path / "data")
    assert said.files[0].bytes > 2 * aligned_file.WRITE_BLOCK
    original = load_file(folder / "model.safetensors")
    for tensor in tensors:
        if tensor.name in original:
            assert same_bits(stored(tmp_path / "data", tensor), original[tensor.name])
    assert said.files[0].sha256 == hashlib.sha256((tmp_path / "data").read_bytes()).hexdigest()


def test_a_tied_head_is_stored_once(tmp_path):
    """The graph reads one tensor twice; the file holds it once."""
    config = tiny_config(tie_word_embeddings=True, num_hidden_layers=1)
    folder = write_checkpoint(tmp_path / "checkpoint", config)
    with Checkpoint.load(folder) as checkpoint:
        tensors = weights.layout(trace(checkpoint.config, "causal-lm", "float32"))
        weights.write_weights(checkpoint, tensors, tmp_path / "data")
    names = [tensor.name for tensor in tensors]
    assert len(set(names)) == len(names)
    assert set(names) == {*load_file(folder / "model.safetensors"), ROTARY_COS, ROTARY_SIN}
    row = load_file(folder / "model.safetensors")["model.embed_tokens.weight"][7].numpy().tobytes()
    assert (tmp_path / "data").read_bytes().count(row) == 1


def test_layout_leaves_out_what_has_its_data_and_attach_points_at_the_file(tmp_path, tiny_checkpoint):
    with Checkpoint.load(tiny_checkpoint) as checkpoint:
        model = model_of(checkpoint)
        small = ir.tensor([1, 2], name="constant")
        model.graph.register_initializer(
            ir.Value(name="constant", const_value=small, shape=small.shape, type=ir.TensorType(small.dtype))
        )
        tensors = weights.layout(model)
        assert "constant" not in [tensor.name for tensor in tensors]
        weights.write_weights(checkpoint, tensors, tmp_path / "data")
    weights.attach(model, tensors, "data")
    ir.save(model, tmp_path / "graph.onnx")
    loaded = ir.load(tmp_path / "graph.onnx").graph.initializers
    original = load_file(tiny_checkpoint / "model.safetensors")
    for name, tensor in original.items():
        assert loaded[name].const_value.numpy().tobytes() == tensor.numpy().tobytes()
    assert (tmp_path / "graph.onnx").stat().st_size < 20_000


@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_rotary_tables_are_those_of_transformers(tmp_path, rope):
    from transformers.models.glm4.configuration_glm4 import Glm4Config as TheirConfig
    from transformers.models.glm4.modeling_glm4 import Glm4RotaryEmbedding

    config = tiny_config(num_hidden_layers=1)
    scaling = {
        "default": {},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    }[rope]
    if scaling:
        config["rope_scaling"] = scaling
    folder = write_checkpoint(tmp_path / "checkpoint", config)
    tensors, _ = written(folder, tmp_path / "data")
    theirs = Glm4RotaryEmbedding(TheirConfig.from_pretrained(folder))
    cos, sin = theirs(torch.zeros(1), torch.arange(256)[None])
    by_name = {tensor.name: stored(tmp_path / "data", tensor) for tensor in tensors}
    torch.testing.assert_close(by_name[ROTARY_COS], cos[0, :, :4], atol=2e-5, rtol=0)
    torch.testing.assert_close(by_name[ROTARY_SIN], sin[0, :, :4], atol=2e-5, rtol=0)
    factor = by_name[ROTARY_COS][0, 0].item()  # cos(0) = 1, times YaRN's factor
    assert factor == pytest.approx({"default": 1.0, "yarn": 0.1 * 1.3862943611 + 1}[rope], rel=1e-6)


def test_rotary_tables_longer_than_a_block(tmp_path, tiny_checkpoint, monkeypatch):
    _, whole = written(tiny_checkpoint, tmp_path / "whole", torch.float16)
    monkeypatch.setattr(weights, "TABLE_ROWS", 100)  # 256 positions: two blocks and a part
    _, parts = written(tiny_checkpoint, tmp_path / "parts", torch.float16)
    assert parts == whole


def test_the_source_digest_is_what_the_manifest_says_it_is(tmp_path, tiny_checkpoint):
    """One line per tensor, sorted by name: name, element type, shape, SHA-256 of its bytes."""
    lines = []
    for name, tensor in sorted(load_file(tiny_checkpoint / "model.safetensors").items()):
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        lines.append(f"{name} float32 {list(tensor.shape)} {digest}\n")
    wanted = hashlib.sha256("".join(lines).encode()).hexdigest()
    for name, dtype in DTYPES.items():
        assert written(tiny_checkpoint, tmp_path / name, dtype)[1].source_sha256 == wanted
    sharded = write_checkpoint(tmp_path / "sharded", tiny_config(), shards=3)
    assert written(sharded, tmp_path / "data")[1].source_sha256 == wanted
    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=1)
    assert written(other, tmp_path / "otherdata")[1].source_sha256 != wanted


@pytest.mark.parametrize(
    ("target", "value"), [("fp16", 7e4), ("fp16", -7e4), ("fp16", 65520.0), ("bf16", 3.4e38)]
)
def test_overflow_is_refused_with_the_tensors_name(tmp_path, target, value):
    name = "model.layers.1.mlp.down_proj.weight"
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config())
    with_tensor(folder, name, lambda tensor: tensor[63, 95].fill_(value))
    with pytest.raises(ExportError, match=rf"tensor {name} holds .* beyond .*float16.*--precision"):
        written(folder, tmp_path / "data", DTYPES[target])
    written(folder, tmp_path / "wide", torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_with_its_place(tmp_path, value):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config())
    with_tensor(folder, "lm_head.weight", lambda tensor: tensor[300, 5].fill_(value))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight\[300, 5\] is (nan|inf)"):
        written(folder, tmp_path / "data")


def test_a_file_system_without_direct_writes_gets_the_same_file(tmp_path, tiny_checkpoint, monkeypatch):
    _, direct = written(tiny_checkpoint, tmp_path / "direct")
    real, refused = os.open, []

    def without_direct(path, flags, mode=0o777, **others):
        if flags & os.O_DIRECT:
            os.close(real(path, flags & ~os.O_DIRECT, mode))  # as tmpfs did: the file is there, open is not
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode, **others)

    monkeypatch.setattr(os, "open", without_direct)
    _, through_cache = written(tiny_checkpoint, tmp_path / "cached")
    assert tmp_path / "cached" in refused
    assert through_cache == direct
    assert (tmp_path / "cached").read_bytes() == (tmp_path / "direct").read_bytes()


def test_short_writes_are_continued(tmp_path, tiny_checkpoint, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, chunk, at: real(fd, chunk[:4096], at))
    _, said = written(tiny_checkpoint, tmp_path / "data")
    assert said.files[0].sha256 == hashlib.sha256((tmp_path / "data").read_bytes()).hexdigest()


@pytest.mark.parametrize("after", [0, 3])
def test_a_failing_write_surfaces(tmp_path, tiny_checkpoint, monkeypatch, after):
    """The write happens on another thread; its error must not be lost there, nor the file be called whole."""
    monkeypatch.setattr(aligned_file, "WRITE_BLOCK", 8192)
    real, calls = os.pwrite, []

    def full(fd, chunk, at):
        calls.append(at)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, chunk, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        written(tiny_checkpoint, tmp_path / "data")
    assert len(calls) < 20  # it stopped soon, not at the end


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config())
    with Checkpoint.load(folder) as checkpoint:
        tensors = weights.layout(model_of(checkpoint))
        os.utime(folder / "model.safetensors", ns=(1, 1))
        with pytest.raises(CheckpointError, match="changed while it was read"):
            weights.write_weights(checkpoint, tensors, tmp_path / "data")


def test_an_encoders_names_are_found(tmp_path):
    config = tiny_config(num_hidden_layers=1)
    folder = write_checkpoint(tmp_path / "checkpoint", config, task="encoder")
    tensors, _ = written(folder, tmp_path / "data")
    wanted = random_tensors(Glm4Config.from_dict(config), "encoder", torch.float32, seed=0)
    for tensor in tensors:
        if not tensor.name.startswith("rotary"):
            assert same_bits(stored(tmp_path / "data", tensor), wanted[tensor.name.removeprefix("model.")])
