"""The session on the CUDA provider, its protocol against the reference, on a GPU made of host memory."""

import fake_cuda
import fake_ort_cuda
import numpy as np
import onnxruntime
import pytest
import torch

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.task_models import load_model
from glm4_runtime import BundleError, Session, kv_cache

GPU_FIRST = dict(providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


@pytest.fixture
def cuda(monkeypatch):
    return fake_cuda.install(monkeypatch, fake_cuda.FakeCuda())


@pytest.fixture
def ort(monkeypatch, cuda):
    """Sessions that were made, and the entries of their configuration."""
    return fake_ort_cuda.install(monkeypatch, cuda)


@pytest.fixture
def session(edited_manifest, ort, monkeypatch):
    monkeypatch.setattr(kv_cache, "SMALLEST_BUCKET", 16)  # so that short prompts make the cache grow
    with Session.open(edited_manifest(**GPU_FIRST)) as opened:
        opened.prefill_chunk = 16
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


def test_runs_and_moves_of_the_cache_keep_their_order(session, reference):
    """Nothing is done on this GPU before somebody waits; growing, copying and clearing stand between runs."""
    sequences = {slot: ids(5 + 9 * slot, seed=slot) for slot in range(4)}
    for slot, tokens in sequences.items():
        close(session.prefill(slot, tokens, logits="all"), expected(reference, tokens))
    for step, chosen in enumerate(([3], [1, 3], [0, 1, 2, 3], [2], [0, 2], [3, 1])):
        new = {slot: 10 + step + slot for slot in chosen}
        result = session.decode(new)
        for slot in chosen:
            sequences[slot].append(new[slot])
            close(result[slot], expected(reference, sequences[slot])[-1])
    before = session._capacity
    close(session.prefill(3, ids(90, seed=9)), expected(reference, sequences[3] + ids(90, seed=9))[-1:])
    assert session._capacity > before
    session.release(0)
    session.copy_prefix(2, 0, 12)
    close(session.decode({0: 77})[0], expected(reference, [*sequences[2][:12], 77])[-1])
    session.truncate(3, 6)
    close(session.prefill(3, [9, 8], logits="all"), expected(reference, [*sequences[3][:6], 9, 8])[6:])
    sequences[1].append(5)
    close(session.decode({1: 5})[1], expected(reference, sequences[1])[-1])


def test_the_provider_shares_our_stream_and_keeps_no_spare_memory(session, ort, cuda):
    (made,), _ = ort
    assert made.told == {
        "user_compute_stream": str(session._cache._cuda.stream),
        "arena_extend_strategy": "kSameAsRequested",
    }
    assert list(cuda.queues) == [session._cache._cuda.stream]


@pytest.mark.parametrize(
    ("precision", "activations", "asked"),
    [
        ("int4", "float16", True),
        ("int4", "bfloat16", False),
        ("int8", "float16", False),
        ("fp16", "float16", False),
    ],
)
def test_prompts_are_multiplied_by_int4_weights_where_there_are_kernels(
    edited_manifest, ort, precision, activations, asked
):
    Session.open(edited_manifest(**GPU_FIRST, precision=precision, activations=activations)).close()
    assert ort[1] == ({"ep.cuda.fpa_intb_gemm": "1"} if asked else {})


def test_logits_of_a_step_come_to_pinned_memory_and_those_of_prompts_do_not(session, cuda):
    def pinned(logits):
        address = logits.ctypes.data
        return any(start <= address < start + len(memory) for start, memory in cuda.pinned.items())

    prompt = session.prefill(0, ids(20), logits="all")
    assert not pinned(prompt)
    session.prefill(1, ids(7))
    _, logits = session.decode_block({0: 5, 1: 6})
    assert pinned(logits)
    assert len(cuda.pinned) == 1  # one for every number of rows


def test_all_is_given_back(edited_manifest, ort, cuda, monkeypatch):
    bundle = edited_manifest(**GPU_FIRST)
    with Session.open(bundle) as session:
        session.prefill(0, ids(20))
        assert cuda.blocks
    assert (cuda.blocks, cuda.pinned, cuda.queues) == ({}, {}, {})
    session.close()  # a second time is harmless

    def damaged(*_, **__):
        raise RuntimeError("no graph")

    monkeypatch.setattr(onnxruntime, "InferenceSession", damaged)
    with pytest.raises(BundleError, match=r"cannot open .*: no graph"):
        Session.open(bundle)
    assert (cuda.blocks, cuda.pinned, cuda.queues) == ({}, {}, {})


def test_a_host_without_a_gpu_is_told(edited_manifest, ort, cuda):
    cuda.devices = 0
    bundle = edited_manifest(**GPU_FIRST)
    with pytest.raises(BundleError, match=r"CUDA finds no NVIDIA GPU here .*; ask for CPUExecutionProvider"):
        Session.open(bundle)
    with Session.open(bundle, provider="CPUExecutionProvider") as session:
        session.prefill(0, ids(5))
    assert ort[0][0].told == {}


def test_nvidias_libraries_are_loaded_before_the_provider(edited_manifest, ort, cuda, monkeypatch, capsys):
    order, made = [], onnxruntime.InferenceSession

    def preload():
        order.append("preload")
        print("Failed to load libcublas.so.13: cannot open shared object file")

    def opened(path, options, providers):
        order.append(providers[0][0])
        return made(path, options, ["CPUExecutionProvider"])  # as where the libraries are missing

    monkeypatch.setattr("onnxruntime.preload_dlls", preload)
    monkeypatch.setattr("onnxruntime.InferenceSession", opened)
    bundle = edited_manifest(**GPU_FIRST)
    with pytest.raises(
        BundleError, match=r"did not start here \(Failed to load libcublas.*pip install .*\[cuda\]"
    ):
        Session.open(bundle)
    assert order == ["preload", "CUDAExecutionProvider"]
    assert capsys.readouterr().out == ""  # what it prints is no part of a command's answer
    assert (cuda.blocks, cuda.pinned, cuda.queues) == ({}, {}, {})
    monkeypatch.delattr("onnxruntime.preload_dlls")  # an older onnxruntime
    with pytest.raises(BundleError, match="the driver is too old"):
        Session.open(bundle)
