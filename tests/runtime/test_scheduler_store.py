"""Prompts that start from the prefix cache on disk have the same tokens as computed ones."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint
from stored_run import GREEDY, Run, ids, wait_for

from glm4_deploy.pipeline import ExportOptions, export
from glm4_runtime import Session
from glm4_runtime.cluster.order import order_of
from glm4_runtime.cluster.replica import ReplicaActor, ReplicaOptions
from glm4_runtime.errors import BundleError
from glm4_runtime.prefix_store.piece import TOKENS
from glm4_runtime.prefix_store.store import PrefixStore
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.scheduler import Request

SAMPLED = SamplingParams(max_tokens=8, temperature=1.0, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A random model with room for 2048 positions, by the type of its KV cache."""
    folder = tmp_path_factory.mktemp("stored")
    checkpoint = write_checkpoint(folder / "checkpoint", tiny_config(max_position_embeddings=2048))
    for kind in ("fp32", "fp16", "bf16", "int8"):
        options = ExportOptions(target="cpu", kv_cache=kind, max_batch_size=4, parity=False)
        export(checkpoint, folder / kind, options)
    return {kind: folder / kind for kind in ("fp32", "fp16", "bf16", "int8")}


@pytest.fixture(params=["fp32", "fp16", "bf16", "int8"])
def bundle(request, bundles):
    return bundles[request.param]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_second_process_starts_warm_with_the_same_tokens(bundle, tmp_path, params):
    request = Request(ids(300), params)
    with Run(bundle) as run:
        cold = run.ask(request)
        assert run.fed == 300
    with Run(bundle, tmp_path / "cache") as run:
        assert run.ask(request) == cold
    with Run(bundle, tmp_path / "cache") as run:
        assert run.ask(request) == cold
        assert (run.fed, run.cached) == (300 - 256, [256])
        stats = run.scheduler.stats()
        assert (stats.cached_tokens, stats.stored_tokens) == (256, 256)


@pytest.mark.parametrize("length", [256, 257, 319, 320, 321, 384])
def test_prompts_shorter_and_longer_than_the_files(bundle, tmp_path, length):
    """Only whole pieces are stored, and the last token of a prompt is always computed."""
    with Run(bundle, tmp_path / "cache", chunk=100, step_tokens=70) as run:
        run.ask(Request(ids(320), GREEDY))
    request = Request(ids(384)[:length], SAMPLED)
    with Run(bundle) as run:
        cold = run.ask(request)
    with Run(bundle, tmp_path / "cache", chunk=37) as run:
        assert run.ask(request) == cold
        assert run.fed == length - min(length - 1, 320, length // TOKENS * TOKENS)


def test_rows_from_the_disk_have_the_bits_of_computed_ones(bundle, tmp_path):
    request = Request(ids(320), GREEDY)
    with Run(bundle, tmp_path / "cache", step_tokens=50) as run:
        run.ask(request)
    with Run(bundle, tmp_path / "cache") as run:
        run.ask(request)
        assert run.cached == [319]
        warm = run.session.read_positions(0, 0, 320)
    with Run(bundle, chunk=111) as run:
        run.ask(request)
        np.testing.assert_array_equal(run.session.read_positions(0, 0, 320), warm)


def test_a_shared_system_prompt_is_read_for_other_questions(bundle, tmp_path):
    system = ids(200)
    with Run(bundle, tmp_path / "cache") as run:
        run.ask(Request(system + ids(100, 1), GREEDY))
    request = Request(system + ids(100, 2), GREEDY)
    with Run(bundle) as run:
        cold = run.ask(request)
    with Run(bundle, tmp_path / "cache") as run:
        assert run.ask(request) == cold
        assert run.cached == [192]


def test_the_next_turn_of_a_chat_is_stored_whole(bundle, tmp_path):
    """Its beginning is in the slot already, and its middle was generated."""
    first = ids(290)
    with Run(bundle, tmp_path / "cache") as run:
        (answer,) = run.ask(Request(first, SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)))
        second = first + tuple(answer) + ids(30, 1)
        run.ask(Request(second, GREEDY))
        assert run.cached == [369]
    with Run(bundle, tmp_path / "cache") as run:
        run.ask(Request(second, GREEDY))
        assert run.cached == [384]


def test_requests_of_other_groups_start_cold(bundle, tmp_path):
    with Run(bundle, tmp_path / "cache") as run:
        run.ask(Request(ids(300), GREEDY, group="a"))
        run.ask(Request(ids(300), GREEDY, group="b"))
        assert run.cached == [0]
        run.ask(Request(ids(300), GREEDY, group="a"))
        assert run.cached == [299]
    with Run(bundle, tmp_path / "cache") as run:
        run.ask(Request(ids(300), GREEDY, group="c"))
        assert run.cached == [0]
        run.ask(Request(ids(300), GREEDY, group="b"))
        assert run.cached == [256]


def test_a_piece_that_is_torn_is_computed_and_stored_again(bundle, tmp_path):
    request = Request(ids(300), GREEDY)
    with Run(bundle, tmp_path / "cache") as run:
        cold = run.ask(request)
        chain = run.store.chain(np.array(ids(300)), None, "")
    chain.path(2).write_bytes(chain.path(2).read_bytes()[:-1])
    for cached in (128, 256):
        with Run(bundle, tmp_path / "cache") as run:
            assert run.ask(request) == cold
            assert run.cached == [cached]


def test_many_requests_at_once_have_the_tokens_of_a_cold_run(bundles, tmp_path):
    bundle, system = bundles["fp32"], ids(150)
    requests = [Request(system + ids(60 + 37 * n, n), SAMPLED) for n in range(12)]
    with Run(bundle) as run:
        cold = [run.ask(one)[0] for one in requests]
    for _ in range(2):
        with Run(bundle, tmp_path / "cache", step_tokens=90) as run:
            assert run.ask(*requests) == cold
    assert run.scheduler.stats().stored_tokens > 0


def test_a_disk_that_cannot_be_written_fails_no_request(bundles, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("glm4_runtime.prefix_store.store.write_atomically", refuse)
    with Run(bundles["fp32"]) as run:
        cold = run.ask(Request(ids(300), GREEDY))
    with Run(bundles["fp32"], tmp_path / "cache") as run:
        assert run.ask(Request(ids(300), GREEDY)) == cold


def test_a_cancelled_request_stops_reading(bundles, tmp_path):
    with Run(bundles["fp32"], tmp_path / "cache") as run:
        run.ask(Request(ids(1000), GREEDY))
    with Run(bundles["fp32"], tmp_path / "cache") as run:
        run.scheduler.submit(Request(ids(1000), GREEDY), lambda _: None).cancel()
        run.ask(Request(ids(300, 5), GREEDY))
        assert run.cached == [0]


def test_an_error_of_the_lookup_fails_no_request(bundles, tmp_path, monkeypatch):
    with Run(bundles["fp32"], tmp_path / "cache") as run:
        monkeypatch.setattr(run.store, "present", lambda _: 1 / 0)
        run.ask(Request(ids(300), GREEDY))
        assert run.fed == 300


def test_an_adapter_of_the_same_name_with_other_matrices_shares_nothing(demo_slots, demo_adapters, tmp_path):
    def ask(folder, name="it"):
        with Run(demo_slots, tmp_path / "cache") as run:
            run.scheduler.load_adapter(name, folder)
            run.ask(Request(ids(300), GREEDY, adapter=name))
            return run.cached[0]

    assert ask(demo_adapters["poet"]) == 0
    assert ask(demo_adapters["clerk"]) == 0
    assert ask(demo_adapters["poet"], "another name") == 256


KILLED = """
import sys
sys.path[:0] = {path!r}
from stored_run import GREEDY, Run, ids, wait_for
from glm4_runtime.scheduler import Request
with Run({bundle!r}, {folder!r}) as run:
    for turn in range(10**6):
        if turn == 1:
            run.store.flush()
            print("ready", flush=True)
        run.ask(*(Request(ids(400, turn % 9 + seed), GREEDY) for seed in range(3)))
"""


def kill_in_a_loop(bundle, folder, times):
    code = KILLED.format(path=[str(Path(__file__).parents[1])], bundle=str(bundle), folder=str(folder))
    for turn in range(times):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.02 * (turn % 5))
        process.kill()
        process.communicate(timeout=60)
    requests = [Request(ids(400, seed), GREEDY) for seed in range(11)]
    with Run(bundle) as run:
        cold = [run.ask(one) for one in requests]
    with Run(bundle, folder) as run:
        assert [run.ask(one) for one in requests] == cold
        assert run.scheduler.stats().stored_tokens > 0


def test_no_kill_leaves_a_wrong_answer(bundles, tmp_path):
    kill_in_a_loop(bundles["fp32"], tmp_path / "cache", 3)


@pytest.mark.more
def test_none_of_two_hundred_kills_leaves_a_wrong_answer(bundles, tmp_path):
    kill_in_a_loop(bundles["fp32"], tmp_path / "cache", 200)


def test_each_replica_uses_the_folder(demo_cpu, tmp_path):
    def ask():
        options = ReplicaOptions(str(demo_cpu), (1,), 4, cache=tmp_path / "cache")
        actor = ReplicaActor(options)
        order = order_of(Request(ids(300), replace(GREEDY, seed=1)))
        actor.submit(1, order)
        wait_for(lambda: actor.report().stats.requests["length"] == 1)
        return actor

    first = ask()
    first._work._scheduler.stop()  # as the end of its process, which writes what waits
    second = ask()
    assert second.report().stats.stored_tokens == 256
    second._work._scheduler.stop()


def test_scored_prompts_are_computed(bundles, tmp_path):
    with Run(bundles["fp32"], tmp_path / "cache") as run:
        run.ask(Request(ids(300), GREEDY))
    with Run(bundles["fp32"], tmp_path / "cache") as run:
        run.ask(Request(ids(300), GREEDY, prompt_logprobs=0))
        assert run.fed == 300


def test_a_session_without_host_memory_is_refused(tmp_path, bundles):
    with Session.open(bundles["fp32"]) as session:
        type_of = type("Elsewhere", (type(session),), {"copies_positions": False})
        session.__class__ = type_of
        with pytest.raises(BundleError, match="--cache needs a KV cache in host memory"):
            PrefixStore(tmp_path / "cache", 10**9, session)


def test_one_sequence_alone_uses_the_same_files(bundle, tmp_path):
    prompt = list(ids(300))
    with Session.open(bundle) as session:
        cold = [token.id for token in session.generate(prompt, SAMPLED)]
    with Run(bundle, tmp_path / "cache") as run:
        run.ask(Request(tuple(prompt), SAMPLED))
    with Run(bundle, tmp_path / "cache") as run:
        assert [token.id for token in run.session.generate(prompt, SAMPLED, store=run.store)] == cold
        assert run.fed == 44


@pytest.mark.parametrize("alone", [False, True], ids=["scheduler", "alone"])
def test_the_cache_grows_once_for_a_prefix_from_the_disk(bundles, tmp_path, alone):
    request = Request(ids(1000), GREEDY)
    with Run(bundles["fp32"], tmp_path / "cache") as run:
        expected = run.ask(request)[0]
    with Run(bundles["fp32"], tmp_path / "cache") as run:
        resize, sizes = run.session._resize_cache, []
        run.session._resize_cache = lambda size: (sizes.append(size), resize(size))
        if alone:
            tokens = run.session.generate(list(request.prompt_ids), GREEDY, store=run.store)
            assert [token.id for token in tokens] == expected
        else:
            assert run.ask(request)[0] == expected
        assert sizes == [1024]
