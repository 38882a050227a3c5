"""The model's table against the reference model, which is written without it."""

import pytest
import torch
from checkpoints import tiny_config

from glm4_exporters.architecture import (
    HEAD,
    LAYER_SITES,
    MATRICES,
    expected_tensors,
    matrix_width,
    parameter_count,
    site_width,
)
from glm4_exporters.config import TASKS, Glm4Config
from glm4_exporters.quantize.calibrate import BlockedAttention
from glm4_exporters.reference import Glm4DecoderLayer
from glm4_exporters.task_models import MODELS


def config_of(**overrides):
    return Glm4Config.from_dict(tiny_config(num_labels=5, head_dim=24, **overrides))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_the_table_is_the_reference_model(task, bias, tied):
    config = config_of(attention_bias=bias, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = MODELS[task](config)
    prefix = "model." if task == "encoder" else ""
    shapes = {f"{prefix}{name}": tuple(weight.shape) for name, weight in model.named_parameters()}
    assert expected_tensors(config, task) == shapes
    assert parameter_count(config, task) == sum(weight.numel() for weight in model.parameters())


def test_widths_are_those_of_the_matrices():
    config = config_of()
    shapes = expected_tensors(config, "causal-lm")
    for name, shape in shapes.items():
        if len(shape) == 2:
            assert matrix_width(config, name) == shape[1]
    assert matrix_width(config, HEAD) == 64
    for site, matrices in LAYER_SITES.items():
        assert {shapes[f"model.layers.1.{name}.weight"][1] for name in matrices} == {site_width(config, site)}


def test_a_layers_steps_are_its_forward_and_reach_each_site_in_order():
    config = config_of()
    layer = Glm4DecoderLayer(config, 0)
    attend, x = BlockedAttention(config, 7), torch.randn(1, 7, 64)
    read = []
    for name in MATRICES:
        layer.get_submodule(name).register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    with torch.inference_mode():
        expected = layer(x, attend)
        seen = list(dict.fromkeys(id(value) for value in read))
        inputs = [next(value for value in read if id(value) == each) for each in seen]
        *steps, found = layer.sites(x, attend)
    assert torch.equal(found, expected)
    assert len(steps) == len(LAYER_SITES)
    for one, other in zip(steps, inputs, strict=True):
        assert torch.equal(one, other)
