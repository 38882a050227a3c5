"""The whole model in float32 with the edits of an export, but nothing rounded."""

from collections.abc import Mapping

import torch

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.quantize.smooth import Smoothing
from glm4_exporters.task_models import Glm4ForCausalLM


def edited_model(
    checkpoint: Checkpoint, smoothing: Smoothing, norm_bits: Mapping[str, int]
) -> Glm4ForCausalLM:
    """Weights multiplied by ``smoothing``, and the eps of each norm by 2^-2k."""
    with torch.device("meta"):
        model = Glm4ForCausalLM(checkpoint.config)
    state = {
        name: smoothing.apply(name, checkpoint.read(checkpoint.name_of(name)).float(), 0)
        for name in model.state_dict()
    }
    model.load_state_dict(state, assign=True)
    for norm, k in norm_bits.items():
        model.get_submodule(norm).eps *= 2.0 ** (-2 * k)
    return model.eval()
