"""Sessions whose stages are engines, on a TensorRT and a CUDA made of host memory, against the reference."""

import shutil

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
import torch

from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.task_models import load_model
from glm4_runtime import BundleError, SamplingParams, Session
from glm4_runtime.bundle import EngineProfile, read_manifest
from glm4_runtime.session.cuda_device import Cuda
from glm4_runtime.session.engine_run import host_type
from glm4_runtime.session.engine_stage import open_engine_stage
from glm4_runtime.session.stage import Step

ROWS, CAPACITY, COUNTERS = 4, 256, 8
PREFILL = EngineProfile(
    "prefill", "", 0, {"batch": (1, 1, 1), "sequence": (1, 32, 32), "positions": (1, 1, 8)}
)
DECODE = EngineProfile(
    "decode", "", 1, {"batch": (1, ROWS, ROWS), "sequence": (1, 1, 1), "positions": (1, 1, 1)}
)


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, tiny_checkpoint):
    """A bundle of two stages of one layer each, in the dialect of engines."""
    folder = tmp_path_factory.mktemp("graphs") / "bundle"
    options = ExportOptions("native", "fp32", max_batch_size=ROWS, parity=False, stages=(2,))
    return export(tiny_checkpoint, folder, options).bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, graphs, kind):
    """The full TensorRT's engines have our plugin, with its counters."""
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(graphs, folder)
    counters = COUNTERS if kind == "tensorrt" else None
    return fake_tensorrt.make_engine_bundle(folder, (PREFILL, DECODE), CAPACITY, counters=counters, kind=kind)


@pytest.fixture
def cuda(monkeypatch):
    return fake_cuda.install(monkeypatch, fake_cuda.FakeCuda())


@pytest.fixture
def tensorrt(monkeypatch, tmp_path, cuda, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake_tensorrt.install(monkeypatch, cuda, kind)


@pytest.fixture
def session(bundle, tensorrt):
    with Session.open(bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    return load_model(Checkpoint.load(tiny_checkpoint))


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(4, 300, count).tolist()


def expected(reference, tokens):
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0].numpy()


def close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, atol=2e-5)


def test_a_long_prefill_runs_in_chunks_and_the_last_stage_in_parts(session, reference, tensorrt):
    """The engine has room for the logits of 8 positions, and the first stage none at all."""
    tokens = ids(75)
    close(session.prefill(0, tokens, logits="all"), expected(reference, tokens))
    first, last = (context.runs for context in tensorrt.contexts)
    assert [run["input_ids"] for run in first] == [(1, 32), (1, 32), (1, 16)]  # 11 padded
    hidden = [run[name] for run in last for name in run if name.startswith("model.layers.0/")]
    assert hidden == [(1, 8, 64)] * 9 + [(1, 4, 64)]  # 3 padded
    close(session.prefill(1, tokens[:20]), expected(reference, tokens[:20])[-1:])
    close(session.prefill(1, tokens[20:31], logits=3), expected(reference, tokens[:31])[-3:])


def test_decode_of_any_set_of_slots(session, reference):
    sequences = {slot: ids(5 + 9 * slot, seed=slot) for slot in range(4)}
    for slot, tokens in sequences.items():
        session.prefill(slot, tokens)
    for step, chosen in enumerate(([3], [1, 3], [0, 1, 2, 3], [2], [0, 2], [3, 1], [3, 1], [0, 1, 2, 3])):
        new = {slot: 10 + step + slot for slot in chosen}
        result = session.decode(new)
        for slot in chosen:
            sequences[slot].append(new[slot])
            close(result[slot], expected(reference, sequences[slot])[-1])


def test_each_stage_captures_its_own_step(session, reference, cuda):
    tokens = ids(9)
    session.prefill(0, tokens)
    for step in range(4):
        tokens.append(20 + step)
        close(session.decode({0: tokens[-1]})[0], expected(reference, tokens)[-1])
        assert cuda.launches == 2 * step  # the first step runs, the second is recorded and launched
    assert len(cuda.graphs) == 2


def test_copy_truncate_score_and_generate(session, reference):
    tokens = ids(40)
    session.prefill(2, tokens)
    session.copy_prefix(2, 0, 25)
    close(session.decode({0: 77})[0], expected(reference, [*tokens[:25], 77])[-1])
    session.truncate(2, 12)
    close(session.prefill(2, [99, 98], logits="all"), expected(reference, [*tokens[:12], 99, 98])[12:])
    close(np.concatenate(list(session.score(tokens, chunk=13))), expected(reference, tokens))
    session.release(0)
    generated = [t.id for t in session.generate(tokens[:7], SamplingParams(max_tokens=20, ignore_eos=True))]
    sequence = tokens[:7]
    for token in generated:
        assert token == int(expected(reference, sequence)[-1].argmax())
        sequence.append(token)
    assert len(generated) == 20


def test_a_slot_can_be_filled_to_its_end(session, reference):
    tokens = ids(CAPACITY)
    session.prefill(0, tokens[:254])
    close(session.prefill(0, tokens[254:255]), expected(reference, tokens[:255])[-1:])
    close(session.decode({0: tokens[255]})[0], expected(reference, tokens)[-1])


def test_each_stage_has_its_layers_cache_and_everything_is_given_back(bundle, tensorrt, cuda, kind):
    with Session.open(bundle, max_batch_size=2) as session:
        row = 2 * CAPACITY * 16 * 4  # heads, positions, dims, bytes
        assert [size for size in cuda.blocks.values() if size == 2 * row] == [2 * row] * 4
        session.prefill(0, ids(200))
        session.decode({0: 5})
        session.decode({0: 5})
        first, last = (set(context.addresses) for context in tensorrt.contexts[:2])
        assert {name for name in first if "key_values" in name} == {
            f"{side}_key_values.0.{part}" for side in ("past", "present") for part in ("key", "value")
        }
        assert {name for name in last if "key_values" in name} == {
            f"{side}_key_values.1.{part}" for side in ("past", "present") for part in ("key", "value")
        }
        assert session.provider.startswith(f"{kind} ")
        assert not session.copies_positions
        with pytest.raises(BundleError, match="needs a KV cache in host memory"):
            session.require_host_cache()
        with pytest.raises(BundleError, match="needs a KV cache in host memory"):
            session.read_positions(0, 0, 4)
        with pytest.raises(BundleError, match="needs a KV cache in host memory"):
            session.append_positions(1, np.zeros((4, 2, 3, 16), np.float32))
        assert session.length(1) == 0
    assert (cuda.blocks, cuda.pinned, cuda.queues, cuda.graphs) == ({}, {}, {}, {})
    session.close()  # a second time is harmless


def test_a_discarded_row_is_cleared_in_both_stages(session, cuda):
    session.prefill(0, ids(9))
    session.discard(0)
    cuda.wait()
    for stage in session._stages:
        for *_, shape, address in stage._cache.views(0, 1):
            content = fake_tensorrt._array(cuda, address, np.float32, shape)
            assert not content.any()


def test_without_memory_for_the_second_stage_nothing_is_left(bundle, tensorrt, cuda):
    with Session.open(bundle):
        needed = cuda.peak
    cuda.limit = needed - 100_000
    with pytest.raises(BundleError, match="no GPU memory for a KV cache of 4 slots of 256 positions"):
        Session.open(bundle)
    assert (cuda.blocks, cuda.pinned, cuda.queues) == ({}, {}, {})


def test_one_stage_alone_runs_and_frees_its_memory(bundle, tensorrt, cuda):
    """As in a process of its own: only this stage's engine is opened."""
    manifest, skipped = read_manifest(bundle), {}
    device = Cuda("tensorrt-rtx", "")
    stage = open_engine_stage(bundle, manifest, manifest.stages[1], ROWS, device, skipped)
    hidden = np.random.default_rng(0).standard_normal((1, 5, 64)).astype(np.float32)
    logits = stage.run(hidden, Step(2, [0], np.array([[4]])))
    assert logits.shape == (1, 1, manifest.model.vocab_size)
    assert (stage.layers, len(tensorrt.contexts)) == (1, 1)
    stage.close()
    device.close()
    assert (cuda.blocks, cuda.pinned, cuda.queues) == ({}, {}, {})


def test_bfloat16_is_handed_over_as_its_bits():
    assert host_type("bfloat16") == np.uint16
    assert host_type("float16") == np.float16


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [dict(provider="CPUExecutionProvider"), dict(threads=2)])
def test_options_of_onnx_runtime_are_refused(bundle, tensorrt, option):
    with pytest.raises(BundleError, match=f"an engine, to which {next(iter(option))} means nothing"):
        Session.open(bundle, **option)


def test_a_host_without_a_gpu_is_told(bundle, tensorrt, cuda):
    cuda.devices = 0
    with pytest.raises(BundleError, match=r"CUDA finds no NVIDIA GPU here.*--target ort"):
        Session.open(bundle)
    assert cuda.queues == {}


def test_engines_of_stages_in_another_order_are_refused(bundle, tensorrt, cuda, tmp_path):
    from bundles import rehash

    folder = tmp_path / "swapped"
    shutil.copytree(bundle, folder)
    (folder / "stage-1.engine").write_bytes((bundle / "stage-2.engine").read_bytes())
    rehash(folder)
    with pytest.raises(BundleError, match=r"stage-1\.engine has other inputs and outputs than the manifest"):
        Session.open(folder)
    assert (cuda.blocks, cuda.queues) == ({}, {})
