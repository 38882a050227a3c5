"""Pairs of transformers' model and the reference model, with the same random weights."""

import torch
import transformers

from glm4_exporters import task_models
from glm4_exporters.config import Glm4Config

TOLERANCE = 1e-5


def config_of(**overrides):
    settings = dict(
        vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=10000.0,
        pad_token_id=0, eos_token_id=[1, 2, 3], attention_bias=True, attn_implementation="eager",
    )  # fmt: skip
    return transformers.Glm4Config(**settings | overrides)


def pair(name, theirs_config):
    """transformers' model with random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(theirs_config).eval()
    for key, parameter in theirs.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.15)
    config = Glm4Config.from_dict(theirs_config.to_dict() | {"architectures": [name]})
    ours = getattr(task_models, name)(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def close(ours, theirs, tolerance=TOLERANCE):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
