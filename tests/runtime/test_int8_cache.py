"""Sessions whose KV cache is int8: all that the protocol does with rows, lengths and capacities."""

import numpy as np
import pytest
import torch

from glm4_deploy.pipeline import ExportOptions, export
from glm4_exporters.checkpoint import Checkpoint
from glm4_exporters.task_models import load_model
from glm4_runtime import Session, kv_cache

# Here the same bits come out of chunks of any size. Where kernels for other sizes differ in the last bits, a
# key half way between two steps of int8 may be rounded to either. Int8 itself moves these logits by 0.03.
TOLERANCE = 5e-3


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(4, 300, count).tolist()


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(request, tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("int8 cache") / request.param
    export(tiny_checkpoint, folder, ExportOptions(precision=request.param, kv_cache="int8", max_batch_size=4))
    return folder


@pytest.fixture
def session(bundle):
    with Session.open(bundle) as opened:
        opened.prefill_chunk = 16
        yield opened


@pytest.fixture
def whole(bundle):
    """Logits of every position by one run over all tokens, in a session of their own."""

    def run(tokens):
        with Session.open(bundle, max_batch_size=1) as session:
            return session.prefill(0, tokens, logits="all")

    return run


def close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=TOLERANCE)


def test_the_cache_is_int8_and_near_the_reference(session, tiny_checkpoint):
    assert session.manifest.kv_cache == "int8"
    assert {spec.dtype for spec in session.manifest.inputs if "past_key" in spec.name} == {"int8"}
    tokens = ids(50)
    with torch.inference_mode():
        exact = load_model(Checkpoint.load(tiny_checkpoint))(torch.tensor([tokens])).logits[0].numpy()
    error = np.abs(session.prefill(0, tokens, logits="all") - exact)
    assert 0.03 < error.max() < 0.15
    for array in session._cache.arrays:
        assert array.dtype == np.int8
        assert np.abs(array[0, :, :50].astype(int)).max() > 60  # the steps are used
        assert not array[0, :, 50:].any()


def test_chunks_compute_what_one_run_does(session, whole):
    tokens = ids(70)
    wanted = whole(tokens)
    close(session.prefill(0, tokens, logits="all"), wanted)
    close(np.concatenate(list(session.score(tokens, chunk=7))), wanted)
    session.prefill(1, tokens[:33])
    close(session.decode({1: tokens[33]})[1], wanted[33])


def test_decode_of_any_set_of_slots_moves_rows(session, whole):
    sequences = {slot: ids(5 + 9 * slot, seed=slot) for slot in range(4)}
    for slot, tokens in sequences.items():
        session.prefill(slot, tokens)
    for step, chosen in enumerate(([3], [1, 3], [0, 1, 2, 3], [2], [0, 2], [3, 1])):
        new = {slot: 10 + step + slot for slot in chosen}
        result = session.decode(new)
        for slot in chosen:
            sequences[slot].append(new[slot])
            close(result[slot], whole(sequences[slot])[-1])


def test_truncate_and_copy_prefix(session, whole):
    tokens = ids(40)
    session.prefill(2, tokens)
    session.copy_prefix(2, 0, 25)
    session.truncate(2, 12)
    close(session.decode({0: 77})[0], whole([*tokens[:25], 77])[-1])
    close(session.prefill(2, [99, 98], logits="all"), whole([*tokens[:12], 99, 98])[12:])


def test_the_cache_grows_and_shrinks(session, whole, monkeypatch):
    monkeypatch.setattr(kv_cache, "SMALLEST_BUCKET", 8)
    tokens, sizes = ids(45), set()
    wanted = whole(tokens)
    session.prefill(0, tokens[:5])
    for position in range(5, 45):
        close(session.decode({0: tokens[position]})[0], wanted[position])
        sizes.add(session._cache.arrays[0].shape[2])
    assert sizes == {8, 16, 32, 64}
    session.truncate(0, 4)
    close(session.decode({0: 9})[0], whole([*tokens[:4], 9])[-1])
    assert session._cache.arrays[0].shape[2] == 8


def test_decode_is_bitwise_blind_to_the_other_slots(bundle):
    results = []
    for poison in (False, True):
        with Session.open(bundle) as session:
            for slot in range(4):
                session.prefill(slot, ids(20 + slot, seed=slot))
            session.decode({1: 7, 3: 8})
            if poison:
                rows = [session._slots.row(slot) for slot in (0, 2)]
                for array in session._cache.arrays:
                    array[rows] = -128
                    for slot in (1, 3):  # and what lies past the end of the slots that take part
                        array[session._slots.row(slot), :, session.length(slot) + 1 :] = 127
            results.append([session.decode({1: token, 3: token + 1}) for token in (9, 20, 31)])
    for clean, dirty in zip(*results, strict=True):
        for slot in (1, 3):
            assert clean[slot].tobytes() == dirty[slot].tobytes()
