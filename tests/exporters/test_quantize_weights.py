"""Matrices as stored parts: the operators that read them, and that they compute with the stored values."""

from collections import Counter

import numpy as np
import pytest
import torch
from checkpoints import random_tensors, tiny_config, write_checkpoint
from graphs import logits, lower, traced, written
from safetensors.torch import save_file

from glm4_exporters.architecture import EMBEDDING, HEAD
from glm4_exporters.config import Glm4Config
from glm4_exporters.formats import FORMATS
from glm4_exporters.passes.quantize_weights import QuantizeWeights

DOWN = "model.layers.1.mlp.down_proj.weight"
NAMES = (EMBEDDING, "model.layers.0.self_attn.q_proj.weight", DOWN, HEAD)
CONFIG = Glm4Config.from_dict(tiny_config())


def stored_checkpoint(folder, formats):
    """The tiny checkpoint with the values that its matrices have in their formats."""
    source = write_checkpoint(folder, tiny_config())
    tensors = random_tensors(CONFIG, "causal-lm", torch.float32, seed=0)
    for name, form in formats.items():
        rows = tensors[name]
        parts = form.encode(rows, torch.bfloat16, largest=float(rows.abs().max()))
        tensors[name] = form.decode(parts, rows.shape[1]).contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


CASES = {
    "MatMulNBits": ("ort", "fused", "int8", 0.03),  # accuracy level 4: the kernel rounds its inputs
    "MatMulNBits, 4 bits": ("ort", "fused", "int4-signed", 0.03),
    "a scale per row": ("ort", "fused", "int8-channel", 1e-5),
    "DequantizeLinear": ("native", "standard", "int8-channel", 1e-5),
    "DequantizeLinear, 4 bits": ("native", "standard", "int4", 1e-5),
    "DequantizeLinear, fp8": ("native", "standard", "fp8", 1e-2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_graph_computes_with_the_stored_values(tmp_path, case):
    target, products, name, tolerance = CASES[case]
    # A table is looked up in its stored form by fused products, in blocks, only.
    looked_up = products == "fused" and FORMATS[name].block and 64 % FORMATS[name].block == 0
    formats = {n: FORMATS[name] for n in NAMES if n != EMBEDDING or looked_up}
    plain, stored = lower(traced(), target), lower(traced(), target)
    assert QuantizeWeights(products, formats)(stored).modified
    assert not {*formats} & {*stored.graph.initializers}
    written(plain, stored_checkpoint(tmp_path / "values", formats), tmp_path / "plain")
    written(stored, write_checkpoint(tmp_path / "exact", tiny_config()), tmp_path / "stored")
    as_written = products == "standard" or FORMATS[name].block is None
    one, other = (logits(tmp_path / name, as_written=as_written) for name in ("plain", "stored"))
    assert np.linalg.norm(one - other) < tolerance * np.linalg.norm(one)


def test_each_format_gets_its_operators():
    model = lower(traced(), "ort")
    casts = [node.op_type for node in model.graph].count("Cast")
    formats = {DOWN: FORMATS["int8-channel"], HEAD: FORMATS["int8"], EMBEDDING: FORMATS["int4-wide"]}
    QuantizeWeights("fused", formats)(model)
    found = Counter(node.op_type for node in model.graph)
    assert (found["MatMulNBits"], found["GatherBlockQuantized"], found["DequantizeLinear"]) == (1, 1, 1)
    assert found["Cast"] - casts == 3  # bfloat16 scales, which no operator takes beside float32


def test_tables_that_no_operator_looks_up_stay():
    for products, target, name in (("standard", "native", "int8"), ("fused", "ort", "int8-channel")):
        model = lower(traced(), target)
        QuantizeWeights(products, {EMBEDDING: FORMATS[name]})(model)
        assert EMBEDDING in model.graph.initializers
