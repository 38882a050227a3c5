"""The session protocol on ONNX Runtime, for both dialects, against the reference model and against itself."""

import time

import numpy as np
import pytest
import torch

from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.task_models import load_model
from glm4_runtime import BundleError, RequestError, SamplingParams, Session, SlotError

RNG = np.random.default_rng(0)


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(4, 300, count).tolist()


@pytest.fixture
def session(tiny_bundle):
    with Session.open(tiny_bundle) as opened:
        opened.prefill_chunk = 16
        yield opened


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    return load_model(Checkpoint.load(tiny_checkpoint))


def expected(reference, tokens):
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0].numpy()


def close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, atol=2e-5)


def test_prefill_in_chunks_and_the_logits_asked_for(session, reference):
    tokens = ids(50)
    wanted = expected(reference, tokens)
    close(session.prefill(0, tokens), wanted[-1:])
    close(session.prefill(1, tokens, logits="all"), wanted)
    close(session.prefill(2, tokens, logits=20), wanted[-20:])
    assert [session.length(slot) for slot in range(4)] == [50, 50, 50, 0]
    close(session.prefill(3, tokens[:33]), wanted[32:33])
    close(session.prefill(3, tokens[33:40], logits="all"), wanted[33:40])


def test_decode_of_any_set_of_slots(session, reference):
    sequences = {slot: ids(5 + 9 * slot, seed=slot) for slot in range(4)}
    for slot, tokens in sequences.items():
        session.prefill(slot, tokens)
    for step, chosen in enumerate(([3], [1, 3], [0, 1, 2, 3], [2], [0, 2], [3, 1])):
        new = {slot: 10 + step + slot for slot in chosen}
        result = session.decode(new)
        assert set(result) == set(chosen)
        for slot in chosen:
            sequences[slot].append(new[slot])
            close(result[slot], expected(reference, sequences[slot])[-1])


def test_a_decoded_block_has_the_rows_of_decode(session):
    for slot in (3, 1, 2):
        session.prefill(slot, ids(10 + slot, seed=slot))
    slots, logits = session.decode_block({1: 5, 3: 6})
    rows = {slot: row.copy() for slot, row in zip(slots, logits, strict=True)}
    for slot in (1, 3):
        session.truncate(slot, 10 + slot)
    expected = session.decode({3: 6, 1: 5})
    assert set(rows) == set(expected)
    for slot, row in rows.items():
        assert row.tobytes() == expected[slot].tobytes()


def test_decode_is_bitwise_blind_to_the_other_slots(tiny_bundle):
    """Same slots, same batch shape; what the other slots hold is poisoned in one run and not in the other."""
    results = []
    for poison in (False, True):
        with Session.open(tiny_bundle) as session:
            for slot in range(4):
                session.prefill(slot, ids(20 + slot, seed=slot))
            session.decode({1: 7, 3: 8})
            if poison:
                rows = [session._slots.row(slot) for slot in (0, 2)]
                for array in session._cache.arrays:
                    array[rows] = np.nan
                    for slot in (1, 3):  # and what lies past the end of the slots that take part
                        array[session._slots.row(slot), :, session.length(slot) + 1 :] = 1e4
            results.append([session.decode({1: token, 3: token + 1}) for token in (9, 20, 31)])
    for clean, dirty in zip(*results, strict=True):
        for slot in (1, 3):
            assert clean[slot].tobytes() == dirty[slot].tobytes()
            assert np.isfinite(clean[slot]).all()


def test_truncate_goes_back(session, reference):
    tokens = ids(30)
    session.prefill(0, tokens)
    session.decode({0: 5})
    session.truncate(0, 12)
    assert session.length(0) == 12
    other = [*tokens[:12], 99, 98]
    close(session.prefill(0, other[12:], logits="all"), expected(reference, other)[12:])


def test_copy_prefix_shares_a_start(session, reference):
    tokens = ids(40)
    session.prefill(2, tokens)
    session.copy_prefix(2, 0, 25)
    forked = [*tokens[:25], 77]
    close(session.decode({0: 77})[0], expected(reference, forked)[-1])
    close(session.decode({2: 78})[2], expected(reference, [*tokens, 78])[-1])


def test_release_frees_the_slot_for_another_sequence(session, reference):
    session.prefill(1, ids(60, seed=1))
    session.release(1)
    session.release(1)
    assert session.free_slots() == [0, 1, 2, 3]
    tokens = ids(9, seed=2)
    close(session.prefill(1, tokens), expected(reference, tokens)[-1:])


def test_score_is_teacher_forced_and_gives_its_slot_back(session, reference):
    tokens = ids(70)
    blocks = list(session.score(tokens, chunk=13))
    assert all(block.dtype == np.float32 and len(block) <= 13 for block in blocks)
    close(np.concatenate(blocks), expected(reference, tokens))
    assert session.free_slots() == [0, 1, 2, 3]
    partly = session.score(tokens, chunk=10)
    next(partly)
    assert session.free_slots() == [1, 2, 3]
    partly.close()
    assert session.free_slots() == [0, 1, 2, 3]


def test_greedy_generation_is_the_references(session, reference):
    tokens = ids(11)
    generated = [t.id for t in session.generate(tokens, SamplingParams(max_tokens=64, ignore_eos=True))]
    sequence = list(tokens)
    for token in generated:
        assert token == int(expected(reference, sequence)[-1].argmax())
        sequence.append(token)
    assert len(generated) == 64
    assert session.free_slots() == [0, 1, 2, 3]


def test_generation_ends_when_the_slot_is_full(tiny_bundle):
    with Session.open(tiny_bundle, max_seq_len=20) as session:
        tokens = list(session.generate(ids(15), SamplingParams(ignore_eos=True)))
        assert len(tokens) == 5  # prompt and output together have the session's length
        assert tokens[-1].finish_reason == "length"
        assert len(list(session.generate(ids(19), SamplingParams(ignore_eos=True)))) == 1
        with pytest.raises(RequestError, match="20 tokens"):
            session.generate(ids(20))


def test_a_full_slot_leaves_the_others_unharmed(tiny_bundle, reference):
    with Session.open(tiny_bundle, max_seq_len=16, max_batch_size=2) as session:
        full, other = ids(16, seed=1), ids(6, seed=2)
        close(session.prefill(0, full), expected(reference, full)[-1:])
        session.prefill(1, other)
        with pytest.raises(SlotError, match="slot 0 holds 16 of 16"):
            session.decode({0: 5, 1: 5})
        assert session.length(1) == 6
        close(session.decode({1: 5})[1], expected(reference, [*other, 5])[-1])
        for step in range(9):
            session.decode({1: step})
        assert session.length(1) == 16


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda s: s.prefill(9, [5]), SlotError, r"slot 9 does not exist; this session has slots 0 \.\.\. 3"),
        (lambda s: s.prefill(-1, [5]), SlotError, "slot -1 does not exist"),
        (lambda s: s.prefill(True, [5]), SlotError, "slot True"),
        (lambda s: s.decode({2: 5}), SlotError, "slot 2 is not in use"),
        (lambda s: s.prefill(1, []), RequestError, "no tokens"),
        (
            lambda s: s.prefill(1, [5, 320]),
            RequestError,
            r"token id 320 is outside the vocabulary 0 \.\.\. 319",
        ),
        (lambda s: s.prefill(1, [5, -1]), RequestError, "token id -1"),
        (lambda s: s.prefill(1, [0.5]), RequestError, "integers"),
        (lambda s: s.decode({0: 999}), RequestError, "token id 999"),
        (lambda s: s.prefill(1, [5] * 257), SlotError, "no room for 257"),
        (lambda s: s.prefill(1, [5], logits=2), RequestError, "logits is 2"),
        (lambda s: s.prefill(1, [5], logits="some"), RequestError, "logits is 'some'"),
        (lambda s: s.truncate(0, 11), SlotError, "holds 10 positions"),
        (lambda s: s.copy_prefix(0, 0, 3), SlotError, "slot 0 is in use"),
        (lambda s: s.copy_prefix(0, 1, 11), SlotError, "not 11"),
        (lambda s: s.copy_prefix(2, 1, 1), SlotError, "slot 2 is not in use"),
        (lambda s: s.score([5], chunk=0), RequestError, "chunk"),
        (lambda s: s.classify([5]), RequestError, "exported for causal-lm"),
        (lambda s: s.encode([5]), RequestError, "--task encoder"),
    ],
)
def test_refusals_change_nothing(tiny_bundle, act, kind, message):
    with Session.open(tiny_bundle) as session:
        session.prefill(0, ids(10))
        caches = [array.copy() for array in session._cache.arrays]
        with pytest.raises(kind, match=message):
            act(session)
        assert session.length(0) == 10
        assert session.free_slots() == [1, 2, 3]
        for before, after in zip(caches, session._cache.arrays, strict=True):
            assert before.tobytes() == after.tobytes()


def test_all_slots_taken_is_said(tiny_bundle):
    with Session.open(tiny_bundle, max_batch_size=1) as session:
        session.prefill(0, [5])
        with pytest.raises(SlotError, match="all 1 slots are in use"):
            next(session.score([5]))
        with pytest.raises(SlotError, match="all 1 slots are in use"):
            next(session.generate([5]))


def test_the_cache_is_updated_in_place(session):
    session.prefill(0, ids(20))
    addresses = [array.ctypes.data for array in session._cache.arrays]
    before = [array[0, :, :20].copy() for array in session._cache.arrays]
    for token in range(30):
        session.decode({0: token})
    assert addresses == [array.ctypes.data for array in session._cache.arrays]
    for old, array in zip(before, session._cache.arrays, strict=True):
        assert old.tobytes() == array[0, :, :20].tobytes()
        assert np.abs(array[0, :, 20:50]).min(axis=-1).max() > 0  # every new position was written
        assert not array[0, :, 50:].any()


def test_the_cache_grows_by_doubling_and_shrinks_again(tmp_path, tiny_bundle, monkeypatch, reference):
    from glm4_runtime import kv_cache

    monkeypatch.setattr(kv_cache, "SMALLEST_BUCKET", 8)
    with Session.open(tiny_bundle) as session:
        tokens, sizes = ids(5), []
        session.prefill(0, tokens)
        for _ in range(40):
            tokens.append(int(RNG.integers(4, 300)))
            close(session.decode({0: tokens[-1]})[0], expected(reference, tokens)[-1])
            sizes.append(session._cache.arrays[0].shape[2])
        assert sorted(set(sizes)) == [8, 16, 32, 64]
        session.truncate(0, 4)
        close(session.decode({0: 9})[0], expected(reference, [*tokens[:4], 9])[-1])
        assert session._cache.arrays[0].shape[2] == 8


@pytest.mark.alone
def test_decode_time_does_not_depend_on_the_limit(tmp_path, tiny_checkpoint):
    """At 200 positions, a session that may reach 32768 decodes as fast as one that may reach 256."""
    import json
    import shutil

    from glm4_deploy.pipeline import ExportOptions, export

    source = tmp_path / "long"
    shutil.copytree(tiny_checkpoint, source)
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 32768}
    (source / "config.json").write_text(json.dumps(config))
    for target in ("native", "ort"):
        export(source, tmp_path / target, ExportOptions(target=target, precision="fp32", parity=False))
        sessions = [Session.open(tmp_path / target, max_seq_len=n, threads=1) for n in (256, 32768)]
        for session in sessions:
            session.prefill(0, ids(200))
        ratios = []
        for _ in range(5):
            times = []
            for session in sessions:
                start = time.perf_counter()
                for token in range(10):
                    session.decode({0: token})
                times.append(time.perf_counter() - start)
                session.truncate(0, 200)
            ratios.append(times[1] / times[0])
        # Without buckets the native graph reads 128 times as many keys.
        assert np.median(ratios) < 2
        for session in sessions:
            session.close()


def test_limits_beyond_the_bundles_are_refused(tiny_bundle):
    with pytest.raises(BundleError, match=r"max_seq_len is 300, but this bundle allows 1 \.\.\. 256"):
        Session.open(tiny_bundle, max_seq_len=300)
    with pytest.raises(BundleError, match="max_batch_size is 0"):
        Session.open(tiny_bundle, max_batch_size=0)


def test_less_than_one_thread_is_refused(tiny_bundle):
    with pytest.raises(BundleError, match="threads is 0, but must be at least 1"):
        Session.open(tiny_bundle, threads=0)


def test_provider_choice_says_why(tiny_bundle, edited_manifest):
    with Session.open(tiny_bundle) as session:
        assert session.provider == "CPUExecutionProvider"
    with pytest.raises(BundleError, match="CUDAExecutionProvider cannot run this bundle"):
        Session.open(tiny_bundle, provider="CUDAExecutionProvider")
    with pytest.raises(
        BundleError,
        match=r"CPUExecutionProvider: the bundle is bf16 for ort, and it has no bfloat16 kernels.*runs on: CUDA",
    ):
        Session.open(
            edited_manifest(providers=["CUDAExecutionProvider"], activations="bfloat16", precision="bf16")
        )


def test_skipped_providers_are_named():
    from glm4_runtime.session.ort import choose_provider

    class Fp16:
        providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
        activations, precision, target = "float16", "fp16", "ort"
        stages = ()

    chosen, skipped = choose_provider(Fp16(), ["AzureExecutionProvider", "CPUExecutionProvider"], None)
    assert chosen == "CPUExecutionProvider"
    assert skipped == {"CUDAExecutionProvider": "the installed onnxruntime does not have it"}


def test_a_failing_run_leaves_the_slot_as_it_was(session, monkeypatch, reference):
    tokens = ids(40)
    session.prefill(0, tokens[:20])
    real, calls = session._run_decoder, []

    def fail_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(session, "_run_decoder", fail_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.prefill(0, tokens[20:] + ids(20))
    with pytest.raises(SlotError, match="not in use"):
        session.decode({1: 5})
    assert session.length(0) == 20
    close(session.prefill(0, tokens[20:]), expected(reference, tokens)[-1:])
