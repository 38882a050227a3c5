"""The session on engines, its protocol against the reference, on a TensorRT and a CUDA made of host memory."""

import shutil
import sys

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest
import torch
from checkpoints import tiny_config, write_checkpoint

from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.task_models import load_model
from glm4_runtime import BundleError, SamplingParams, Session, SlotError
from glm4_runtime.bundle import EngineProfile
from glm4_runtime.session.cuda_device import Cuda
from glm4_runtime.session.tensorrt import padded_width

ROWS, CAPACITY = 4, 256
PREFILL = EngineProfile(
    "prefill", "", 0, {"batch": (1, 1, 1), "sequence": (1, 32, 32), "positions": (1, 1, 8)}
)
DECODE = EngineProfile(
    "decode", "", 1, {"batch": (1, ROWS, ROWS), "sequence": (1, 1, 1), "positions": (1, 1, 1)}
)


@pytest.fixture
def cuda(monkeypatch):
    return fake_cuda.install(monkeypatch, fake_cuda.FakeCuda())


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt"])
def kind(request):
    return request.param


rtx_only = pytest.mark.parametrize("kind", ["tensorrt-rtx"], indirect=True)
full_only = pytest.mark.parametrize("kind", ["tensorrt"], indirect=True)


@pytest.fixture
def tensorrt(monkeypatch, tmp_path, cuda, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake_tensorrt.install(monkeypatch, cuda, kind)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny_bundles, kind):
    folder = tmp_path_factory.mktemp("engine") / "bundle"
    shutil.copytree(tiny_bundles["native"], folder)
    return fake_tensorrt.make_engine_bundle(folder, (PREFILL, DECODE), CAPACITY, kind=kind)


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


def test_prefill_is_chunked_and_padded_and_gives_the_logits_asked_for(session, reference, tensorrt):
    tokens = ids(75)
    wanted = expected(reference, tokens)
    close(session.prefill(0, tokens), wanted[-1:])
    assert [run["input_ids"] for run in tensorrt.contexts[0].runs] == [
        (1, 32),
        (1, 32),
        (1, 16),
    ]  # 11, padded
    close(session.prefill(1, tokens, logits="all"), wanted)
    close(session.prefill(2, tokens, logits=20), wanted[-20:])
    close(session.prefill(3, tokens[:50]), wanted[49:50])
    close(session.prefill(3, tokens[50:60], logits="all"), wanted[50:60])


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


def test_a_step_is_captured_once_per_batch_size_and_then_launched(session, reference, cuda):
    tokens, other = ids(9), ids(12, seed=1)
    session.prefill(0, tokens)
    session.prefill(1, other)
    for step in range(5):
        tokens.append(20 + step)
        close(session.decode({0: tokens[-1]})[0], expected(reference, tokens)[-1])
        assert cuda.launches == step  # the first runs, the second is recorded and launched
    assert len(cuda.graphs) == 1
    for step in range(3):
        tokens.append(30 + step)
        other.append(40 + step)
        result = session.decode({0: tokens[-1], 1: other[-1]})
        close(result[0], expected(reference, tokens)[-1])
        close(result[1], expected(reference, other)[-1])
    assert len(cuda.graphs) == 2
    tokens.append(7)
    close(session.decode({0: 7})[0], expected(reference, tokens)[-1])  # the first graph still holds


def failing(cuda, monkeypatch, where):
    """A CUDA on which a step cannot be recorded."""
    if where == "the engine":
        real = fake_tensorrt.FakeContext.execute_async_v3
        refuses = lambda self, stream: stream not in cuda.recording and real(self, stream)  # noqa: E731
        monkeypatch.setattr(fake_tensorrt.FakeContext, "execute_async_v3", refuses)
        return "the engine did not start a run"
    if where == "the end":
        real = cuda.cudaStreamEndCapture

        def ends(stream):
            real(stream)
            return fake_cuda.INVALID_VALUE, None

        monkeypatch.setattr(cuda, "cudaStreamEndCapture", ends)
        return "cudaStreamEndCapture failed on the GPU"
    status = {"instantiation": fake_cuda.INVALID_VALUE, "memory": fake_cuda.OUT_OF_MEMORY}[where]
    monkeypatch.setattr(cuda, "cudaGraphInstantiate", lambda *_: (status, None))
    return {"instantiation": "cudaGraphInstantiate failed on the GPU", "memory": "no GPU memory left"}[where]


@pytest.mark.parametrize("where", ["the engine", "the end", "instantiation", "memory"])
def test_a_capture_that_fails_is_told_and_not_tried_again(session, reference, cuda, monkeypatch, where):
    said = failing(cuda, monkeypatch, where)
    captures, real = [], cuda.cudaStreamBeginCapture
    monkeypatch.setattr(cuda, "cudaStreamBeginCapture", lambda *a: captures.append(a) or real(*a))
    tokens, other = ids(9), ids(12, seed=1)
    session.prefill(0, tokens)
    session.prefill(1, other)
    assert "CUDA graph" not in session.skipped
    for step in range(3):
        tokens.append(20 + step)
        close(session.decode({0: tokens[-1]})[0], expected(reference, tokens)[-1])
    for step in range(3):  # another number of rows would be recorded for itself
        tokens.append(30 + step)
        other.append(40 + step)
        result = session.decode({0: tokens[-1], 1: other[-1]})
        close(result[0], expected(reference, tokens)[-1])
        close(result[1], expected(reference, other)[-1])
    assert len(captures) == 1
    assert session.skipped["CUDA graph"].startswith(said)  # the first error, not that of leaving the capture
    assert (cuda.launches, cuda.recording) == (0, {})


def test_all_contexts_share_weights_and_activations(session, tensorrt):
    for slot in range(4):
        session.prefill(slot, ids(5, seed=slot))
    for rows in range(1, 5):
        session.decode(dict.fromkeys(range(rows), 5))
    assert len(tensorrt.contexts) == 5
    assert len({id(context.engine) for context in tensorrt.contexts}) == 1
    assert len({context.memory for context in tensorrt.contexts}) == 1


@rtx_only
def test_kernels_of_a_step_are_made_before_it_is_recorded(session, tensorrt):
    for slot in range(4):
        session.prefill(slot, ids(5, seed=slot))
    for rows in range(1, 5):
        session.decode(dict.fromkeys(range(rows), 5))
    kinds = [
        context.config.dynamic_shapes_kernel_specialization_strategy.name for context in tensorrt.contexts
    ]
    assert kinds == ["LAZY", *["EAGER"] * 4]


def test_the_cache_is_allocated_once_and_everything_is_given_back(bundle, tensorrt, cuda):
    with Session.open(bundle, max_batch_size=2) as session:
        row = 2 * CAPACITY * 16 * 4  # heads, positions, dims, bytes
        assert [size for size in cuda.blocks.values() if size == 2 * row] == [2 * row] * 4
        before = set(cuda.blocks)
        session.prefill(0, ids(200))
        session.truncate(0, 3)
        session.decode({0: 5})
        assert len([size for size in cuda.blocks.values() if size == 2 * row]) == 4
        assert before <= set(cuda.blocks)
    assert (cuda.blocks, cuda.pinned, cuda.queues, cuda.graphs) == ({}, {}, {}, {})
    session.close()  # a second time is harmless


@rtx_only
def test_compiled_kernels_are_kept_for_the_next_session(bundle, tensorrt, cuda, tmp_path):
    for tokens, compiled in ((ids(9), 1), (ids(9), 0), (ids(32), 1), (ids(32), 0)):
        tensorrt.compiled.clear()
        with Session.open(bundle) as session:
            session.prefill(0, tokens)
        assert len(tensorrt.compiled) == compiled
    (stored,) = (tmp_path / "cache" / "glm4-deploy").iterdir()
    stored.write_bytes(b"(8, 0):written by another GPU")  # refused, and written anew
    with Session.open(bundle) as session:
        session.prefill(0, ids(9))
    assert stored.read_bytes().startswith(b"(8, 9):")


@rtx_only
def test_a_cache_that_cannot_be_written_harms_nothing(bundle, tensorrt, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with Session.open(bundle) as session:
        session.prefill(0, ids(9))
    session.close()


def test_copy_truncate_score_and_generate(session, reference):
    tokens = ids(40)
    session.prefill(2, tokens)
    session.copy_prefix(2, 0, 25)
    close(session.decode({0: 77})[0], expected(reference, [*tokens[:25], 77])[-1])
    session.truncate(2, 12)
    close(session.prefill(2, [99, 98], logits="all"), expected(reference, [*tokens[:12], 99, 98])[12:])
    close(np.concatenate(list(session.score(tokens, chunk=13))), expected(reference, tokens))
    session.release(0)
    session.release(2)
    generated = [t.id for t in session.generate(tokens[:7], SamplingParams(max_tokens=20, ignore_eos=True))]
    sequence = tokens[:7]
    for token in generated:
        assert token == int(expected(reference, sequence)[-1].argmax())
        sequence.append(token)
    assert len(generated) == 20


def test_a_slot_can_be_filled_to_its_end(session, reference):
    """The last chunk is not padded past the capacity, where nothing may be written."""
    tokens = ids(CAPACITY)
    session.prefill(0, tokens[:250])
    close(session.prefill(0, tokens[250:254], logits="all"), expected(reference, tokens[:254])[250:])
    close(session.prefill(0, tokens[254:255]), expected(reference, tokens[:255])[-1:])
    close(session.decode({0: tokens[255]})[0], expected(reference, tokens)[-1])
    with pytest.raises(SlotError, match="slot 0 holds 256 of 256"):
        session.decode({0: 5})


@pytest.mark.parametrize(
    ("width", "limit", "padded"),
    [(1, 512, 1), (3, 512, 4), (33, 512, 64), (64, 512, 64), (65, 512, 128), (449, 512, 512), (40, 48, 48)],
)
def test_widths_are_few(width, limit, padded):
    assert padded_width(width, limit) == padded


def test_classification_and_encoding(tmp_path, tensorrt, kind):
    for task, method in (("token-classification", "classify"), ("encoder", "encode")):
        source = write_checkpoint(tmp_path / f"{task}-source", tiny_config(), task=task)
        options = ExportOptions(target="native", precision="fp32", task=task, parity=False)
        export(source, tmp_path / task, options)
        tokens = ids(21)
        with Session.open(tmp_path / task) as session:
            wanted = getattr(session, method)(tokens)
        profile = EngineProfile("encode", "", 0, {"batch": (1, 1, 1), "sequence": (1, 32, 256)})
        fake_tensorrt.make_engine_bundle(tmp_path / task, (profile,), None, kind=kind)
        with Session.open(tmp_path / task) as session:
            close(getattr(session, method)(tokens), wanted)
        assert tensorrt.contexts[-1].runs[0]["input_ids"] == (1, 32)


# An engine by our plugin ----------------------------------------------------------------------------

KV_HEADS = 2


@pytest.fixture(scope="module")
def plugin_bundle(tmp_path_factory, tiny_bundles):
    folder = tmp_path_factory.mktemp("plugin") / "bundle"
    shutil.copytree(tiny_bundles["native"], folder)
    return fake_tensorrt.make_engine_bundle(
        folder, (PREFILL, DECODE), CAPACITY, counters=ROWS * KV_HEADS, kind="tensorrt"
    )


@full_only
def test_the_plugins_counters_are_one_buffer_of_zeros(plugin_bundle, tensorrt, cuda, reference):
    """Memory comes as garbage, and the stand-in refuses counters that are not zero or lie at two addresses."""
    tokens = ids(40)
    with Session.open(plugin_bundle, max_batch_size=2) as session:
        close(session.prefill(0, tokens, logits="all"), expected(reference, tokens))
        close(session.prefill(1, tokens[:7]), expected(reference, tokens[:7])[-1:])
        for step in range(4):  # run, recorded, launched; then other rows
            tokens.append(20 + step)
            close(session.decode({0: tokens[-1]})[0], expected(reference, tokens)[-1])
        close(session.decode({0: 3, 1: 4})[0], expected(reference, [*tokens, 3])[-1])
        addresses = {
            context.addresses[name]
            for context in tensorrt.contexts
            for name in ("counters", "present_counters")
        }
        assert len(addresses) == 1
        assert (
            cuda.blocks[addresses.pop()] == 4 * ROWS * KV_HEADS
        )  # the engine's, not the session's fewer slots
    assert (cuda.blocks, cuda.pinned, cuda.queues, cuda.graphs) == ({}, {}, {}, {})


@full_only
def test_an_int8_cache_of_the_plugin(tmp_path, tiny_checkpoint, tensorrt, cuda, reference):
    """The engine's graph is another with such a cache; what differs from float's is its rounding alone."""
    options = ExportOptions(precision="fp32", kv_cache="int8", parity=False, max_batch_size=ROWS)
    export(tiny_checkpoint, tmp_path / "bundle", options)
    fake_tensorrt.make_engine_bundle(
        tmp_path / "bundle", (PREFILL, DECODE), CAPACITY, counters=ROWS * KV_HEADS, kind="tensorrt"
    )
    tokens = ids(40)
    with Session.open(tmp_path / "bundle") as session:
        row = 2 * CAPACITY * 16  # heads, positions, dims, a byte each
        assert [size for size in cuda.blocks.values() if size == ROWS * row] == [ROWS * row] * 4
        near(session.prefill(2, tokens, logits="all"), expected(reference, tokens))
        session.copy_prefix(2, 0, 25)
        tokens = tokens[:25]
        for step in range(4):
            tokens.append(20 + step)
            near(session.decode({0: tokens[-1]})[0], expected(reference, tokens)[-1])


def near(actual, wanted):
    error = np.abs(actual - wanted).max()
    assert 1e-6 < error < 0.05 * np.abs(wanted).max()


@full_only
def test_counters_that_are_not_zeroed_are_noticed(plugin_bundle, tensorrt, monkeypatch):
    """The test above could not fail otherwise."""
    monkeypatch.setattr(Cuda, "allocate_zeroed", Cuda.allocate)
    with Session.open(plugin_bundle) as session, pytest.raises(AssertionError, match="not zero"):
        session.prefill(0, ids(5))


# Refusals ------------------------------------------------------------------------------------------


def test_a_host_without_a_gpu_is_told(bundle, tensorrt, cuda):
    cuda.devices = 0
    with pytest.raises(BundleError, match=r"CUDA finds no NVIDIA GPU here.*--target ort"):
        Session.open(bundle)
    assert cuda.queues == {}


def test_another_version_is_refused_with_what_to_do(bundle, tensorrt, kind):
    built_by, tensorrt.__version__ = tensorrt.__version__, "1.8.0.1"
    with pytest.raises(
        BundleError,
        match=rf"built by {kind} {built_by} and 1\.8\.0\.1 is installed; install {kind}=={built_by}, or export",
    ):
        Session.open(bundle)


@rtx_only
@pytest.mark.parametrize(("capability", "said"), [((7, 5), "75"), ((8, 6), "86"), ((12, 0), "120")])
def test_another_gpu_is_refused_with_what_to_export(bundle, tensorrt, cuda, capability, said):
    cuda.capability = capability
    with pytest.raises(
        BundleError, match=rf"compute capability 80, 89 and this GPU has {said}; .*--sm {said}"
    ):
        Session.open(bundle)
    assert (cuda.blocks, cuda.queues) == ({}, {})


@full_only
def test_full_tensorrt_builds_for_its_own_gpu(bundle, tensorrt, cuda):
    cuda.capability = (9, 0)
    with pytest.raises(BundleError, match=r"80, 89 and this GPU has 90; .*for tensorrt on this host"):
        Session.open(bundle)


def _later(bundle, folder):
    shutil.copytree(bundle, folder)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"later_gpus": false', '"later_gpus": true'))
    return folder


@rtx_only
def test_later_gpus_are_taken_where_the_engine_says_so(tmp_path, bundle, tensorrt, cuda):
    later = _later(bundle, tmp_path / "later")
    cuda.capability = (12, 1)
    Session.open(later).close()
    for capability, said in (((7, 5), "75"), ((8, 6), "86")):
        cuda.capability = capability
        with pytest.raises(BundleError, match=f"80, 89 and later and this GPU has {said}"):
            Session.open(later)


@rtx_only
@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (8, 7), (13, 0)])
def test_a_gpu_that_rtx_does_not_name_is_told_what_runs_there(tmp_path, bundle, tensorrt, cuda, capability):
    """Whatever the engine was built for: TensorRT-RTX has no kernels there, so no --sm can help."""
    cuda.capability = capability
    for folder in (bundle, _later(bundle, tmp_path / "later")):
        with pytest.raises(BundleError) as caught:
            Session.open(folder)
        said = str(caught.value)
        assert f"no kernels for compute capability {''.join(map(str, capability))}" in said
        assert "it has them for 75, 80, 86, 89, 120, 121" in said
        assert "--target tensorrt on this host, or with --target ort --precision fp16" in said
        assert "--sm" not in said
    assert (cuda.blocks, cuda.queues) == ({}, {})


@rtx_only
def test_what_tensorrt_finds_wrong_is_passed_on(bundle, tensorrt, cuda):
    tensorrt.reasons = 1 | 4
    with pytest.raises(
        BundleError, match=r"cannot load .*model\.engine .*: version mismatch, old cuda driver"
    ):
        Session.open(bundle)
    assert (cuda.blocks, cuda.queues) == ({}, {})


def test_an_engine_that_copies_its_cache_is_refused(bundle, tensorrt):
    tensorrt.in_place = False
    with pytest.raises(BundleError, match=r"does not update past_key_values\.0\.key in place"):
        Session.open(bundle)


def test_too_little_gpu_memory_is_said_and_nothing_kept(bundle, tensorrt, cuda):
    cuda.limit = 2 * CAPACITY * 16 * 4 * ROWS
    with pytest.raises(BundleError, match=r"no GPU memory for a KV cache of 4 slots of 256 positions"):
        Session.open(bundle)
    assert (cuda.blocks, cuda.queues) == ({}, {})


@pytest.mark.parametrize("option", [{"provider": "CUDAExecutionProvider"}, {"threads": 2}])
def test_options_that_mean_nothing_are_refused(bundle, tensorrt, option):
    with pytest.raises(BundleError, match=f"{next(iter(option))} means nothing"):
        Session.open(bundle, **option)


def test_without_tensorrt_the_package_is_named(bundle, tensorrt, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, tensorrt._module, None)
    with pytest.raises(BundleError, match=rf"install {kind}=={tensorrt.__version__}") as caught:
        Session.open(bundle)
    assert ("NVIDIA's package index" in str(caught.value)) == (kind == "tensorrt")


@pytest.mark.parametrize(
    ("side", "change", "named"),
    [
        ("inputs", {"adapter_ids": (np.int64, [1])}, "adapter_ids"),
        ("inputs", {"input_ids": None}, "input_ids"),
    ],
)
def test_an_engines_tensors_are_the_manifests(bundle, tensorrt, monkeypatch, side, change, named):
    made = fake_tensorrt.FakeEngine.__init__

    def changed(self, *arguments):
        made(self, *arguments)
        tensors = {**getattr(self, side), **change}
        setattr(self, side, {name: value for name, value in tensors.items() if value is not None})
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    monkeypatch.setattr(fake_tensorrt.FakeEngine, "__init__", changed)
    with pytest.raises(BundleError, match=rf"other inputs and outputs than the manifest \({named}\)"):
        Session.open(bundle)
