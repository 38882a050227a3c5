"""The session on the CUDA provider, against the reference. Needs a GPU and onnxruntime-gpu."""

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import tiny_config, write_checkpoint

from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.task_models import load_model
from glm4_runtime import Session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="no CUDA provider here"
    ),
]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.05), ("bf16", 0.3)])
def test_slots_on_the_gpu(tmp_path, precision, tolerance):
    sizes = dict(hidden_size=128, head_dim=64, intermediate_size=256, max_position_embeddings=1024)
    source = write_checkpoint(tmp_path / "checkpoint", tiny_config(**sizes))
    export(source, tmp_path / "bundle", ExportOptions(precision=precision, parity=False))
    reference = load_model(Checkpoint.load(source))
    rng = np.random.default_rng(0)
    sequences = {slot: rng.integers(4, 300, 40 + 100 * slot).tolist() for slot in range(3)}

    def expected(tokens):
        with torch.inference_mode():
            return reference(torch.tensor([tokens])).logits[0].numpy()

    with Session.open(tmp_path / "bundle", provider="CUDAExecutionProvider") as session:
        for slot, tokens in sequences.items():
            logits = session.prefill(slot, tokens, logits="all")
            np.testing.assert_allclose(logits, expected(tokens), atol=tolerance)
        for chosen in ([2], [0, 2], [0, 1, 2], [1]):
            result = session.decode({slot: 7 + slot for slot in chosen})
            for slot in chosen:
                sequences[slot].append(7 + slot)
                np.testing.assert_allclose(result[slot], expected(sequences[slot])[-1], atol=tolerance)
