"""Small quantized checkpoints of random shapes, groups and layouts, with the values that their numbers stand for."""

import json
import random
import shutil

import torch
from checkpoints import tiny_config
from safetensors.torch import load_file, save_file

from glm4_exporters.architecture import MATRICES, expected_tensors
from glm4_exporters.config import Glm4Config

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def in_words(numbers, bits, places=None):
    """[rows, columns] of unsigned numbers -> int32 [rows, columns * bits / 32], the lowest bits first."""
    together = numbers.to(torch.int64).unflatten(1, (-1, 32 // bits))
    order = places or range(32 // bits)
    words = sum(together[..., column] << bits * place for place, column in enumerate(order))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def awq(numbers, zeros, scales, _chance, bits):
    parts = {"qweight": in_words(numbers.t(), bits, AWQ_PLACES), "scales": scales.t()}
    return parts | {"qzeros": in_words(zeros.t(), bits, AWQ_PLACES)}


def gptq(offset):
    def parts(numbers, zeros, scales, chance, bits):
        width, groups = numbers.shape[1], zeros.shape[1]
        found = {"qweight": in_words(numbers, bits).t(), "qzeros": in_words(zeros.t() - offset, bits)}
        if chance.random() < 0.5:
            found["g_idx"] = (torch.arange(width) // (width // groups)).to(torch.int32)
        return found | {"scales": scales.t()}

    return parts


def packed(numbers, zeros, scales, _chance, bits):
    return {
        "weight_packed": in_words(numbers, bits),
        "weight_scale": scales,
        "weight_zero_point": in_words(zeros.t(), bits).t(),
    }


def packed_settings(bits, group):
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "group_size": group}
    weights["strategy"] = "channel" if group is None else "group"
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def gptq_settings(layout):
    return lambda bits, group: {
        "quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": False, "desc_act": False,
        "checkpoint_format": layout,
    }  # fmt: skip


# By name: the parts of a matrix, the settings, the bits to choose from, and the smallest zero point that is stored.
LAYOUTS = {
    "awq": (awq, lambda _bits, group: {"quant_method": "awq", "bits": 4, "group_size": group or -1}, (4,), 0),
    "gptq": (gptq(1), gptq_settings("gptq"), (4, 8), 1),
    "gptq_v2": (gptq(0), gptq_settings("gptq_v2"), (4, 8), 0),
    "compressed-tensors": (packed, packed_settings, (4, 8), 0),
}


def random_sizes(chance):
    """Sizes of a model, and a group that divides every width."""
    group = chance.choice((None, 8, 16, 24, 32, 40, 64, 96, 128))
    step = group or 8
    head_dim = chance.choice((8, 16, 24))
    heads = step // 8 * chance.choice((1, 2)) if group else chance.choice((2, 4))
    kv_heads = chance.choice([n for n in range(1, heads + 1) if heads % n == 0])
    hidden, inner = (step * chance.randint(1, max(1, 128 // step)) for _ in range(2))
    return group, {
        "head_dim": head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden,
        "intermediate_size": inner, "vocab_size": chance.randint(40, 90), "num_hidden_layers": 1,
        "attention_bias": chance.random() < 0.5, "tie_word_embeddings": chance.random() < 0.25,
    }  # fmt: skip


def write_quantized(folder, seed):
    """Write a random checkpoint.

    Returns:
        float32 values by the checkpoint's names, of the quantized matrices and of all others.
    """
    chance = random.Random(seed)
    torch.manual_seed(seed)
    group, sizes = random_sizes(chance)
    config = tiny_config(**sizes)
    parts_of, settings_of, known_bits, smallest = LAYOUTS[chance.choice(sorted(LAYOUTS))]
    bits, dtype = chance.choice(known_bits), chance.choice((torch.float16, torch.bfloat16))
    left = {name for name in MATRICES if chance.random() < 0.15}
    tensors, values, apart = {}, {}, {}
    for name, shape in expected_tensors(Glm4Config.from_dict(config), "causal-lm").items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or module.partition(".layers.0.")[2] in {*left, ""}:
            plain = torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1) + ("norm" in name)
            tensors[name] = plain.to(dtype)
            values[name] = tensors[name].float()
            continue
        rows, width = shape
        groups = 1 if group is None else width // group
        numbers = torch.randint(0, 1 << bits, (rows, width))
        zeros = torch.randint(smallest, 1 << bits, (rows, groups))
        scales = (torch.rand(rows, groups) + 0.5).mul(width**-0.5 / (1 << bits)).to(dtype)
        spread = [x.repeat_interleave(width // groups, 1) for x in (zeros, scales.float())]
        values[name] = (numbers - spread[0]).float() * spread[1]
        apart[module] = numbers, zeros, scales
    if chance.random() < 0.3:
        join_qkv(apart)
    for module, arrays in apart.items():
        for first, count, own in stored_as(module, len(arrays[0]), chance):
            parts = parts_of(*(array[first : first + count] for array in arrays), chance, bits)
            tensors |= {f"{own}.{part}": value for part, value in parts.items()}
    folder.mkdir(parents=True)
    config |= {"quantization_config": settings_of(bits, group), "torch_dtype": str(dtype)[6:]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return values


def join_qkv(apart):
    """Store q, k and v as one matrix, if all three are quantized."""
    names = [f"model.layers.0.{name}" for name in QKV]
    if all(name in apart for name in names):
        whole = [torch.cat(arrays) for arrays in zip(*(apart.pop(name) for name in names), strict=True)]
        apart["model.layers.0.self_attn.qkv_proj"] = whole


def stored_as(module, rows, chance):
    """First row, number of rows and name of each stored part: gate and up may be stored apart."""
    if module.endswith("gate_up_proj") and rows % 16 == 0 and chance.random() < 0.5:
        stem = module.removesuffix("gate_up_proj")
        return [(0, rows // 2, f"{stem}gate_proj"), (rows // 2, rows // 2, f"{stem}up_proj")]
    return [(0, rows, module)]


def mutated(folder, target, chance):
    """A copy of a folder with one thing changed: a tensor's type, shape, name or values, or the configuration."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    parts = sorted(name for name in tensors if not name.endswith(("proj.bias", "norm.weight")))
    name = chance.choice(parts)
    tensor = tensors.pop(name)
    change = chance.randrange(8)
    if change == 0:
        tensors[name] = tensor.flatten()[: max(1, tensor.numel() // 2)].clone()
    elif change == 1:
        tensors[name] = tensor.to(chance.choice([torch.int32, torch.int64, torch.float64, torch.uint8]))
    elif change == 2:
        tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()[:1]])
    elif change == 3:
        tensors[name + chance.choice(["x", ".weight", "_scale"])] = tensor
    elif change == 4:
        raw = tensor.clone().reshape(-1).view(torch.uint8)
        for _ in range(8):
            raw[chance.randrange(len(raw))] = chance.choice([0x7F, 0xFF, 0x80, 0])
        tensors[name] = raw.view(tensor.dtype).reshape(tensor.shape)
    elif change >= 6:
        tensors[name] = tensor
        change_value(config["quantization_config"], chance)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors")
    return target


def change_value(settings, chance):
    """Another value at some place of the configuration, or none."""
    key = chance.choice(sorted(settings))
    if isinstance(settings[key], dict) and settings[key] and chance.random() < 0.9:
        change_value(settings[key], chance)
    else:
        settings[key] = chance.choice(
            [None, True, -1, 0, 3, 4, 8, 64, "x", [], ["re:("], [1, 2], {}, {"a": 1}, 1e30]
        )
