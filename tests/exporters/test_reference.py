"""The reference model against transformers' implementation of the same architecture."""

import inspect

import pytest
import torch
from reference_pairs import close, config_of, pair

from glm4_exporters import reference

SHAPES = {
    "bias, 2 kv heads": dict(),
    "no bias, 1 kv head": dict(attention_bias=False, num_key_value_heads=1),
    "8 kv heads": dict(num_attention_heads=8, num_key_value_heads=8),
    "tied embeddings": dict(tie_word_embeddings=True),
    "head_dim is not hidden / heads": dict(head_dim=40, partial_rotary_factor=0.25),
    "full rotation": dict(partial_rotary_factor=1.0),
    "yarn": dict(
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ),
    "yarn, own attention factor": dict(
        rope_scaling={
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32,
            "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0,
        }
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_every_shape(shape):
    ours, theirs = pair("Glm4ForCausalLM", config_of(**SHAPES[shape]))
    ids = torch.randint(1, 211, (2, 90))
    with torch.inference_mode():
        close(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("shape", ["bias, 2 kv heads", "tied embeddings", "yarn"])
def test_loss_and_its_gradients(shape):
    ours, theirs = pair("Glm4ForCausalLM", config_of(**SHAPES[shape]))
    ids = torch.randint(1, 211, (2, 20))
    labels = ids.clone()
    labels[0, :7] = -100
    mine, other = ours(ids, labels=labels), theirs(ids, labels=labels)
    close(mine.loss, other.loss)
    mine.loss.backward()
    other.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter.grad, gradients[name].grad)


def test_half_precision_follows_transformers():
    ours, theirs = (model.to(torch.bfloat16) for model in pair("Glm4ForCausalLM", config_of()))
    ids = torch.randint(1, 211, (1, 30))
    with torch.inference_mode():
        mine, other = ours(ids).logits.float(), theirs(ids).logits.float()
    # Logits of standard deviation 1.2 and bfloat16's 8 bits: a rounding more or less is about 0.01.
    error = (mine - other).abs()
    assert error.max() < 0.1
    assert error.mean() < 0.015


def test_the_architecture_stays_small():
    assert inspect.getsource(reference).count("\n") < 200
