"""The session on real engines, against the reference. Needs a GPU that TensorRT-RTX supports."""

import numpy as np
import pytest
import torch
from checkpoints import tiny_config, write_checkpoint

from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.engine.options import EngineOptions
from glm4_exporters.task_models import load_model
from glm4_runtime import Session
from glm4_runtime.bundle import read_manifest


def _gpus():
    try:
        from cuda.bindings import runtime
    except ImportError:
        return 0
    return runtime.cudaGetDeviceCount()[1] or 0


pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _gpus(), reason="no GPU here")]

SIZES = dict(hidden_size=128, head_dim=64, intermediate_size=256, max_position_embeddings=1024)


@pytest.mark.parametrize("layout", ["shared", "split"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.05), ("bf16", 0.3)])
def test_slots_on_the_gpu(tmp_path, precision, tolerance, layout):
    source = write_checkpoint(tmp_path / "checkpoint", tiny_config(**SIZES))
    options = ExportOptions(
        target="tensorrt-rtx", precision=precision, parity=False, engine=EngineOptions(layout=layout)
    )
    export(source, tmp_path / "bundle", options)
    reference = load_model(Checkpoint.load(source))
    rng = np.random.default_rng(0)
    sequences = {slot: rng.integers(4, 300, 40 + 100 * slot).tolist() for slot in range(3)}

    def expected(tokens):
        with torch.inference_mode():
            return reference(torch.tensor([tokens])).logits[0].numpy()

    with Session.open(tmp_path / "bundle") as session:
        for slot, tokens in sequences.items():
            logits = session.prefill(slot, tokens, logits="all")
            np.testing.assert_allclose(logits, expected(tokens), atol=tolerance)
        for step, chosen in enumerate(([2], [0, 2], [0, 1, 2], [1], [0, 1, 2], [2, 0], [0, 1, 2])):
            result = session.decode({slot: 7 + step + slot for slot in chosen})
            for slot in chosen:
                sequences[slot].append(7 + step + slot)
                np.testing.assert_allclose(result[slot], expected(sequences[slot])[-1], atol=tolerance)


def test_a_cache_of_the_checkpoints_own_length(tmp_path):
    """Above 16384 positions the decode profile takes two queries, and another kernel with it."""
    source = write_checkpoint(
        tmp_path / "checkpoint", tiny_config(**SIZES | {"max_position_embeddings": 32768})
    )
    export(
        source,
        tmp_path / "bundle",
        ExportOptions(target="tensorrt-rtx", precision="fp16", parity=False, max_batch_size=2),
    )
    reference = load_model(Checkpoint.load(source))
    tokens = np.random.default_rng(0).integers(4, 300, 700).tolist()
    with Session.open(tmp_path / "bundle") as session, torch.inference_mode():
        session.prefill(0, tokens)
        for token in (5, 6, 7):
            tokens.append(token)
            wanted = reference(torch.tensor([tokens])).logits[0, -1].numpy()
            np.testing.assert_allclose(session.decode({0: token})[0], wanted, atol=0.05)


def test_the_inspector_finds_what_the_manifest_claims(tmp_path):
    import tensorrt_rtx as trt

    source = write_checkpoint(tmp_path / "checkpoint", tiny_config(**SIZES))
    export(source, tmp_path / "bundle", ExportOptions(target="tensorrt-rtx", precision="fp16", parity=False))
    manifest = read_manifest(tmp_path / "bundle")
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine((tmp_path / "bundle" / "model.engine").read_bytes())
    assert engine.num_optimization_profiles == len(manifest.engine.profiles)
    for profile in manifest.engine.profiles:
        for spec in manifest.inputs:
            wanted = [
                tuple(profile.axes[a][i] if isinstance(a, str) else a for a in spec.shape) for i in range(3)
            ]
            assert list(map(tuple, engine.get_tensor_profile_shape(spec.name, profile.index))) == wanted
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    for layer in range(manifest.model.num_layers):
        assert f"model.layers.{layer}.self_attn/Attention" in text
