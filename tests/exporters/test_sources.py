"""Checkpoints that other tools quantized, read as the values that they stand for.

``tests/data/quantized`` was made by the tools themselves; ``values.json`` there holds what the tools' own readers make
of each matrix. Formats without a tool here are written below, number by number.
"""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import random_tensors, tiny_config
from quantized_folders import mutated
from safetensors.torch import save_file

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_runtime.errors import CheckpointError, Glm4Error

DATA = Path(__file__).parents[1] / "data" / "quantized"
VALUES = json.loads((DATA / "values.json").read_text())
Q_PROJ = "model.layers.0.self_attn.q_proj"

# How each folder's matrices are stored.
STORED = {
    "awq-4": "int4, groups of 64, zero points, float16 scales",
    "compressed-tensors-fp8": "fp8, a scale per matrix, bfloat16 scales",
    "compressed-tensors-fp8-block": "fp8, blocks of 128 x 128, bfloat16 scales",
    "compressed-tensors-fp8-dynamic": "fp8, a scale per row, bfloat16 scales",
    "compressed-tensors-nvfp4a16": "nvfp4, groups of 16, float8 x float32 scales",
    "compressed-tensors-w4-groups-of-32": "int4, groups of 32, bfloat16 scales",
    "compressed-tensors-w4-rows": "int4, a scale per row, zero points, bfloat16 scales",
    "compressed-tensors-w4a16": "int4, groups of 128, bfloat16 scales",
    "compressed-tensors-w4a16-asym": "int4, groups of 128, zero points, bfloat16 scales",
    "compressed-tensors-w8a16": "int8, groups of 128, bfloat16 scales",
    "compressed-tensors-w8a8": "int8, a scale per row, bfloat16 scales",
    "compressed-tensors-w8a8-static": "int8, a scale per row, bfloat16 scales",
    "gptq-4": "int4, groups of 128, float16 scales",
    "gptq-4-act-order": "int4, groups of 32, float16 scales",
    "gptq-4-asym": "int4, groups of 32, zero points, float16 scales",
    "gptq-8": "int8, groups of 64, float16 scales",
}


def quantized(checkpoint):
    """The quantized matrices, by the name that a weight of theirs would have."""
    pieces = [piece.stored for view in checkpoint.views.by_name.values() for piece in view.pieces]
    return {f"{matrix.module}.weight": matrix for matrix in pieces}


def test_every_folder_is_here():
    assert {path.name for path in DATA.iterdir() if path.is_dir()} - {"original"} == STORED.keys()
    assert STORED.keys() - VALUES.keys() == {"compressed-tensors-nvfp4a16"}  # its reader computes in bfloat16


@pytest.mark.parametrize("folder", VALUES)
def test_values_are_those_that_the_tool_reads(folder):
    with Checkpoint.load(DATA / folder) as checkpoint:
        assert {str(matrix.storage) for matrix in quantized(checkpoint).values()} == {STORED[folder]}
        assert quantized(checkpoint).keys() == VALUES[folder].keys()
        for name, (dtype, digest) in VALUES[folder].items():
            matrix = quantized(checkpoint)[name]
            values = matrix.load(checkpoint.read_stored)(0, matrix.rows).values()
            assert values.dtype == torch.float32
            theirs = values.to(getattr(torch, dtype)).contiguous()
            assert hashlib.sha256(theirs.view(torch.int16).numpy().tobytes()).hexdigest() == digest, name


@pytest.mark.parametrize("folder", STORED)
def test_values_are_near_the_original(folder):
    with Checkpoint.load(DATA / folder) as checkpoint, Checkpoint.load(DATA / "original") as original:
        for name in original.tensors:
            values, true = checkpoint.read(name).float(), original.read(name).float()
            if name not in checkpoint.views.by_name:
                assert torch.allclose(values, true, atol=1e-3)
            elif not folder.startswith(("awq", "gptq")):  # which move weights on purpose
                assert (values - true).norm() < 0.12 * true.norm()


def test_blocks_of_rows_are_the_whole(tmp_path):
    with Checkpoint.load(DATA / "gptq-4") as checkpoint:
        name = "model.layers.0.mlp.gate_up_proj.weight"
        buffer = torch.empty(65 * 128 * 4, dtype=torch.uint8)
        blocks = list(checkpoint.row_blocks(name, buffer))
        assert [first for first, _ in blocks] == list(range(0, 512, 64))
        assert torch.equal(torch.cat([block for _, block in blocks]), checkpoint.read(name))


# Formats written here -------------------------------------------------------------------------------


def write(folder, tensors, quantization, **overrides):
    folder.mkdir(exist_ok=True)
    config = tiny_config(**overrides) | {"quantization_config": quantization}
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def plain(**overrides):
    return random_tensors(Glm4Config.from_dict(tiny_config(**overrides)), "causal-lm", torch.float32, seed=3)


def float8(values, scale):
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def in_blocks(weight, size):
    """float8 numbers and the scale of each block of size x size, the last ones shorter."""
    rows, width = weight.shape
    scales = torch.empty(-(-rows // size), -(-width // size))
    numbers = torch.empty(rows, width, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            scales[i, j] = weight[place].abs().max() / 448
            numbers[place] = float8(weight[place], scales[i, j])
    return numbers, scales


def test_float8_in_blocks_as_transformers_writes_it(tmp_path):
    tensors, true = plain(), {}
    for name in [name for name in tensors if "proj.weight" in name]:
        numbers, scales = in_blocks(tensors.pop(name), 24)
        tensors |= {name: numbers, f"{name}_scale_inv": scales}
        rows, width = numbers.shape
        spread = scales.repeat_interleave(24, 0)[:rows].repeat_interleave(24, 1)[:, :width]
        true[name] = numbers.float() * spread
    how = {"quant_method": "fp8", "weight_block_size": [24, 24], "modules_to_not_convert": ["lm_head"]}
    with Checkpoint.load(write(tmp_path / "c", tensors, how)) as checkpoint:
        assert quantized(checkpoint).keys() == true.keys()
        for name, values in true.items():
            assert torch.equal(checkpoint.read(name), values)


def nvfp4(numbers):
    """4-bit floats from their place among the 16, two in a byte."""
    return numbers[:, 0::2] | numbers[:, 1::2] << 4


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_modelopt(tmp_path, where):
    tensors, true = plain(), {}
    chance = torch.Generator().manual_seed(0)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for name in [name for name in tensors if "proj.weight" in name]:
        rows, width = tensors.pop(name).shape
        places = torch.randint(0, 16, (rows, width), generator=chance, dtype=torch.uint8)
        scales = torch.rand(rows, width // 16, generator=chance).add(0.1).to(torch.float8_e4m3fn)
        total = torch.tensor(0.01)
        tensors |= {name: nvfp4(places), f"{name}_scale": scales, f"{name}_scale_2": total}
        tensors[name.replace("weight", "input_scale")] = torch.tensor(0.5)
        signed = torch.cat([magnitudes, -magnitudes])[places.int()]
        true[name] = signed.double() * (scales.double() * 0.01).repeat_interleave(16, 1)
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    how = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    own = {"quant_method": "modelopt"} | how if where == "config.json" else None
    folder = write(tmp_path / "c", tensors, own)
    if own is None:
        (folder / where).write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": how}))
    with Checkpoint.load(folder) as checkpoint:
        assert quantized(checkpoint).keys() == true.keys()
        assert all(matrix.input_scale is not None for matrix in quantized(checkpoint).values())
        for name, values in true.items():
            assert torch.allclose(checkpoint.read(name).double(), values, rtol=1e-6, atol=0)


def test_halves_and_wholes_of_matrices(tmp_path):
    """Gate and up apart, q, k and v together, as other tools write them: with a scale of their own each."""
    tensors, true = plain(), {}
    for layer in range(2):
        scope = f"model.layers.{layer}."
        names = [f"{scope}self_attn.{part}_proj" for part in "qkv"]
        whole = torch.cat([tensors.pop(f"{name}.weight") for name in names])
        tensors[f"{scope}self_attn.qkv_proj.bias"] = torch.cat(
            [tensors.pop(f"{name}.bias") for name in names]
        )
        gate, up = tensors.pop(f"{scope}mlp.gate_up_proj.weight").chunk(2)
        for name, weight in {"self_attn.qkv_proj": whole, "mlp.gate_proj": gate, "mlp.up_proj": up}.items():
            scale = weight.abs().amax(1, keepdim=True) / 448
            tensors |= {f"{scope}{name}.weight": float8(weight, scale), f"{scope}{name}.weight_scale": scale}
            true[f"{scope}{name}"] = float8(weight, scale).float() * scale
    with Checkpoint.load(write(tmp_path / "c", tensors, {"quant_method": "fbgemm_fp8"})) as checkpoint:
        for layer in range(2):
            scope = f"model.layers.{layer}."
            q, k, v = (checkpoint.read(f"{scope}self_attn.{part}_proj.weight") for part in "qkv")
            assert torch.equal(torch.cat([q, k, v]), true[f"{scope}self_attn.qkv_proj"])
            halves = true[f"{scope}mlp.gate_proj"], true[f"{scope}mlp.up_proj"]
            assert torch.equal(checkpoint.read(f"{scope}mlp.gate_up_proj.weight"), torch.cat(halves))
            biases = torch.cat([checkpoint.read(f"{scope}self_attn.{part}_proj.bias") for part in "qkv"])
            assert torch.equal(biases, tensors[f"{scope}self_attn.qkv_proj.bias"])


# What is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes quantizes while it loads; load",
        ),
        ({"load_in_8bit": True}, "bitsandbytes quantizes while it loads"),
        ({"quant_method": "gguf"}, "GGUF is another program's format; give the original"),
        ({"quant_method": "hqq"}, "HQQ is not read; give the original"),
        ({"quant_method": "aqlm"}, 'quant_method is "aqlm"; what is read is awq, compressed-tensors'),
        ({}, "quant_method is null"),
        ("awq", "quantization_config is"),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3; what is read is 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "format": "marlin"}, 'format is "marlin"'),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, 'fmt is "e5m2"'),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, 'quant_algo is "W4A16_AWQ"'),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "transform_config turns"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}}, "sparse"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path, quantization, said):
    folder = write(tmp_path / "c", plain(), quantization)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.load(folder)
    assert said in str(caught.value)


def test_quantized_weights_without_a_configuration(tmp_path):
    shutil.copytree(DATA / "gptq-4", tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"copy config\.json from the tool's output"):
        Checkpoint.load(tmp_path / "c")


def mutate(tmp_path, count, seed):
    folders = [DATA / folder for folder in STORED]
    said = []
    for number in range(count):
        chance = random.Random(seed * 100_000 + number)
        folder = mutated(chance.choice(folders), tmp_path / str(number), chance)
        try:
            with Checkpoint.load(folder) as checkpoint:
                for name in checkpoint.tensors:
                    values = checkpoint.read(name)
                    assert values.isfinite().all()
                    assert values.shape == checkpoint.tensors[name].shape
        except Glm4Error as error:
            said.append(str(error))
        shutil.rmtree(folder)
    assert all("\n" not in one for one in said)
    assert len(said) > count / 3


def test_damaged_folders_are_refused_in_one_line(tmp_path):
    mutate(tmp_path, 60, seed=1)


@pytest.mark.more
def test_many_damaged_folders_are_refused_in_one_line(tmp_path):
    mutate(tmp_path, 500, seed=2)
