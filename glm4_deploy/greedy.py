"""Greedy generation with both whole models, if they fit into memory."""

from collections.abc import Callable, Sequence

import torch

from glm4_deploy.metrics import Logits
from glm4_exporters.architecture import parameter_count
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.eager_attention import KVCache
from glm4_exporters.task_models import load_model
from glm4_runtime.bundle import Manifest

Step = Callable[[Sequence[int]], Logits]  # runs tokens; returns the logits of the last one


def reference_start(checkpoint: Checkpoint) -> Callable[[], Step]:
    """Load the whole reference model; returns a function that starts a new text."""
    model = load_model(checkpoint)

    def start() -> Step:
        cache = KVCache()

        @torch.inference_mode()
        def step(ids: Sequence[int]) -> Logits:
            output = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
            logits: Logits = output.logits[0, -1].numpy()
            return logits

        return step

    return start


def fits_whole(manifest: Manifest, checkpoint: Checkpoint, available: int) -> bool:
    """Whether both whole models fit into 60 % of ``available``: the reference in float32, the bundle mapped and
    packed in float32."""
    parameters = parameter_count(checkpoint.config)
    stored = sum(manifest.files[name].bytes for name in manifest.weight_files)
    needed = 4 * parameters + stored + 4 * parameters
    return needed < 0.6 * available
