"""Tensors that do not agree with the configuration, and the cause that the error names."""

import pytest
import torch
from checkpoint_edits import edit_config, edit_tensors, refusal
from safetensors.torch import load_file, save_file

from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.bundle.file_names import SAFETENSORS

Q_BIAS = "model.layers.1.self_attn.q_proj.bias"


def test_known_harmless_tensors_are_ignored(tiny):
    edit_tensors(
        tiny,
        {
            "model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
    )
    assert len(Checkpoint.load(tiny).tensors) == 29


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
