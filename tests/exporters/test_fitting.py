"""The formats in which targets keep the numbers of quantized checkpoints, and the size of what they make."""

import json
import math
import struct

import pytest
from checkpoints import tiny_config

from glm4_exporters.architecture import expected_tensors
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.config import Glm4Config
from glm4_exporters.passes import model_passes, run
from glm4_exporters.sources.fitting import keep_form
from glm4_exporters.trace import ROTARY_COS, ROTARY_SIN, trace
from glm4_exporters.weights import layout

GLM4_9B = {
    "head_dim": 128, "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_key_value_heads": 2, "vocab_size": 151552,
}  # fmt: skip
LAYERS = 40


def awq(rows, width, group=128):
    groups = width // group
    return {"qweight": ("I32", (width, rows // 8)), "qzeros": ("I32", (groups, rows // 8)),
            "scales": ("F16", (groups, rows))}  # fmt: skip


def packed(bits, group, zeros):
    def parts(rows, width):
        groups = width // (group or width)
        found = {
            "weight_packed": ("I32", (rows, width * bits // 32)),
            "weight_scale": ("BF16", (rows, groups)),
        }
        return found | ({"weight_zero_point": ("I32", (rows * bits // 32, groups))} if zeros else {})

    return parts


def int8_rows(rows, width):
    return {"weight": ("I8", (rows, width)), "weight_scale": ("BF16", (rows, 1))}


def nvfp4(rows, width):
    return {"weight": ("U8", (rows, width // 2)), "weight_scale": ("F8_E4M3", (rows, width // 16)),
            "weight_scale_2": ("F32", (1,))}  # fmt: skip


def scheme(bits, group=None, zeros=False):
    weights = {"num_bits": bits, "type": "int", "symmetric": not zeros, "group_size": group}
    weights["strategy"] = "group" if group else "channel"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


KINDS = {
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": 128}),
    "4 bits, groups of 32, zero points": (packed(4, 32, True), scheme(4, 32, True)),
    "4 bits, rows": (packed(4, None, False), scheme(4)),
    "4 bits, rows, zero points": (packed(4, None, True), scheme(4, None, True)),
    "8 bits, groups of 128": (packed(8, 128, False), scheme(8, 128)),
    "8 bits, rows": (int8_rows, scheme(8)),
}
NVFP4 = (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
BYTES = {"I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F32": 4}


def write_sparse(folder, kind, layers):
    """A checkpoint of the 9B's widths in a file without data: only headers are read."""
    parts_of, quantization = kind
    config = tiny_config(**GLM4_9B, num_hidden_layers=layers) | {"quantization_config": quantization}
    header, end = {}, 0
    for name, shape in expected_tensors(Glm4Config.from_dict(config), "causal-lm").items():
        module, kept = name.removesuffix(".weight"), not name.endswith("proj.weight") or len(shape) != 2
        parts = (
            {name: ("F16", shape)}
            if kept
            else {f"{module}.{key}": part for key, part in parts_of(*shape).items()}
        )
        for part, (dtype, dims) in parts.items():
            nbytes = math.prod(dims) * BYTES[dtype]
            header[part] = {"dtype": dtype, "shape": dims, "data_offsets": [end, end + nbytes]}
            end += nbytes
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder, end


def kept_bytes(folder, target):
    """Bytes of all stored tensors but the rotary tables, which no checkpoint has."""
    with Checkpoint.load(folder) as checkpoint:
        form = keep_form(checkpoint, target, None)
        model = trace(checkpoint.config, "causal-lm", form.activations)
        run(model, model_passes(form, norm_bits={}, cache_scales=(), input_scales={}))
    return sum(tensor.nbytes for tensor in layout(model) if tensor.name not in (ROTARY_COS, ROTARY_SIN))


def all_layers(one, two):
    """What 40 layers take, from what one and two take."""
    return one + (LAYERS - 1) * (two - one)


def growth(tmp_path, kind, targets):
    """By target: the bundle of the whole 9B divided by its checkpoint."""
    folders, stored = zip(*(write_sparse(tmp_path / f"{n}", kind, n) for n in (1, 2)), strict=True)
    return {
        target: all_layers(*(kept_bytes(folder, target) for folder in folders)) / all_layers(*stored)
        for target in targets
    }


def test_a_bundle_of_the_9b_is_at_most_3_percent_larger_than_its_checkpoint(tmp_path):
    """The largest growth of all: a scale and a zero point for each 128 inputs, where the checkpoint has one a row."""
    assert 1.02 < growth(tmp_path, KINDS["4 bits, rows, zero points"], ["cpu"])["cpu"] <= 1.03


@pytest.mark.more
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_bundle_of_the_9b_is_at_most_3_percent_larger(tmp_path, kind):
    found = growth(tmp_path, kind, ("cpu", "ort", "native"))
    assert max(found.values()) <= 1.03
    assert found["native"] < 1.0003


@pytest.mark.more
@pytest.mark.parametrize(
    ("kind", "target", "factor"),
    [
        ((packed(4, 16, True), scheme(4, 16, True)), "cpu", 1.033),  # zero points take 8 bits
        (NVFP4, "cpu", 1.79),
        (NVFP4, "native", 1.79),
    ],
)
def test_bundles_of_the_9b_that_are_larger(tmp_path, kind, target, factor):
    assert growth(tmp_path, kind, [target])[target] == pytest.approx(factor, abs=0.005)
