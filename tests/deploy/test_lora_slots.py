"""``export --lora-slots``: adapters that a session loads at run time, chosen for each sequence."""

import itertools
import shutil

import numpy as np
import pytest
from adapters import rewrite, write_adapter
from checkpoints import tiny_config, write_checkpoint
from cpu_operators import needs_cpu_operators

from glm4_deploy.pipeline import ExportOptions, export
from glm4_runtime import Session
from glm4_runtime.errors import BundleError, CheckpointError, ExportError, RequestError, SlotError

CPU_INT8 = pytest.param("cpu", "int8", marks=needs_cpu_operators)
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
ADAPTERS = {  # by name
    "a": dict(target_modules=MATRICES, r=3),
    "b": dict(target_modules=["q_proj", "down_proj", "lm_head"], r=6, use_rslora=True),
    "c": dict(target_modules="all-linear", rank_pattern={"v_proj": 5}, alpha_pattern={"o_proj": 2}),
}
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
OTHERS = [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Its MLP is wide enough for the gated product of target cpu."""
    config = tiny_config(intermediate_size=128)
    return write_checkpoint(tmp_path_factory.mktemp("slots") / "base", config, dtype="float32")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("adapters")
    made = {
        name: write_adapter(base, folder / name, seed=seed, **options)
        for seed, (name, options) in enumerate(ADAPTERS.items())
    }
    for each in made.values():  # PEFT saves a copy of an adapted head beside its matrices
        rewrite(each, lambda found: {key: tensor for key, tensor in found.items() if "base_layer" not in key})
    return made


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, base):
    """A function that exports once per target, precision and activations."""
    made = {}

    def bundle(target, precision, activations=None):
        key = target, precision, activations
        if key not in made:
            folder = tmp_path_factory.mktemp("bundles") / "bundle"
            options = ExportOptions(
                target, precision, activations=activations, lora_slots=3, lora_rank=8, parity=False
            )
            export(base, folder, options)
            made[key] = folder
        return made[key]

    return bundle


@pytest.fixture(scope="module")
def packed(bundles):
    return bundles("cpu", "int8")


def logits(session, adapter, ids=IDS, slot=0, chunk=None):
    session.use_adapter(slot, adapter)
    chunk = chunk or len(ids)
    parts = [session.prefill(slot, ids[i : i + chunk], "all") for i in range(0, len(ids), chunk)]
    session.release(slot)
    return np.concatenate(parts)


def load_all(session, adapters):
    for name, folder in adapters.items():
        session.load_adapter(name, folder)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    ("target", "precision", "activations", "tolerance"),
    [("native", "fp32", None, 2e-3), ("ort", "fp32", None, 2e-3), ("ort", "fp16", None, 2e-2)],
)
def test_logits_are_those_of_the_merged_checkpoint(
    tmp_path, base, adapters, bundles, name, target, precision, activations, tolerance
):
    """The merge is held against PEFT's in tests/exporters/test_adapters.py."""
    merged = ExportOptions(target, precision, adapters=((str(adapters[name]), 1.0),), parity=False)
    export(base, tmp_path / "merged", merged)
    with Session.open(tmp_path / "merged") as one, Session.open(bundles(target, precision)) as two:
        untouched = logits(two, None)
        load_all(two, adapters)
        expected, found = logits(one, None), logits(two, name)
        assert np.abs(expected - untouched).max() > 0.1
        assert np.abs(found - expected).max() < tolerance * np.abs(expected - untouched).max()


@needs_cpu_operators
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_cpu_changes_logits_as_in_float32(adapters, packed, bundles, name):
    """Target cpu rounds the inputs of base products to 8 bits, so only the change by the adapter is compared."""
    changes = []
    for bundle in (packed, bundles("native", "fp32")):
        with Session.open(bundle) as session:
            untouched = logits(session, None)
            load_all(session, adapters)
            changes.append(logits(session, name) - untouched)
    assert np.linalg.norm(changes[0] - changes[1]) < 0.1 * np.linalg.norm(changes[1])


def test_gate_and_up_as_halves_are_the_fused_matrix(tmp_path, base, packed, bundles):
    fused = write_adapter(base, tmp_path / "fused", target_modules=["gate_up_proj", "down_proj"])
    halves = shutil.copytree(fused, tmp_path / "halves")
    rewrite(halves, split_gate_and_up, target_modules=["gate_proj", "up_proj", "down_proj"])
    for bundle, tolerance in ((packed, 2e-3), (bundles("native", "fp32"), 1e-4)):
        with Session.open(bundle) as session:
            load_all(session, {"fused": fused, "halves": halves})
            found, expected = logits(session, "halves"), logits(session, "fused")
            assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def split_gate_and_up(tensors):
    found = {}
    for name, tensor in tensors.items():
        halves = tensor.chunk(2) if "gate_up_proj.lora_B" in name else (tensor, tensor)
        for half, part in zip(("gate_proj", "up_proj"), halves, strict=True):
            found[name.replace("gate_up_proj", half)] = part.clone()
    return found


# Target cpu: the same bits alone and in any mix ----------------------------------------------------


@needs_cpu_operators
def test_a_mix_has_the_bits_of_each_sequence_alone(adapters, packed):
    with Session.open(packed, max_batch_size=8) as session:
        alone = {None: decoded(session, [None])[0]}
        load_all(session, adapters)
        alone |= {name: decoded(session, [name])[0] for name in adapters}
        assert len({row.tobytes() for row in alone.values()}) == 4
        for count in range(2, 9):
            for first in itertools.islice(itertools.permutations((None, "a", "b", "c"), 2), 0, 12, 5):
                mix = [*first, "c", None, "a", "b", "b", "a"][:count]
                for name, row in zip(mix, decoded(session, mix), strict=True):
                    np.testing.assert_array_equal(row, alone[name], err_msg=f"{name} in {mix}")


def decoded(session, mix):
    """Logits of three decode steps of one prompt on several slots, [sequences, 3 * vocab]."""
    for slot, name in enumerate(mix):
        session.use_adapter(slot, name)
        session.prefill(slot, IDS)
    steps = [session.decode(dict.fromkeys(range(len(mix)), token)) for token in (7, 8, 9)]
    for slot in range(len(mix)):
        session.release(slot)
    return [np.concatenate([step[slot] for step in steps]) for slot in range(len(mix))]


@needs_cpu_operators
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_and_threads_change_no_bit(adapters, packed, threads):
    with Session.open(packed) as one, Session.open(packed, threads=threads) as other:
        for session in (one, other):
            load_all(session, adapters)
        expected = logits(one, "a")
        for chunk in (1, 3, 7, len(IDS)):
            np.testing.assert_array_equal(logits(other, "a", chunk=chunk), expected)


@needs_cpu_operators
def test_without_an_active_adapter_the_base_graph_runs_and_no_adapter_is_read(adapters, packed):
    """Reading an adapter would give NaN: its elements are overwritten."""
    with Session.open(packed) as untouched, Session.open(packed) as session:
        assert session._adapted is None  # not even opened
        load_all(session, adapters)
        for name, array in session._table.arrays.items():
            if name.startswith("adapter.") and array.dtype == np.float16:
                array[:] = np.nan
        np.testing.assert_array_equal(logits(session, None), logits(untouched, None))
        np.testing.assert_array_equal(decoded(session, [None, None])[1], decoded(untouched, [None])[0])
        assert session.adapter_runs == 0
        assert {node_type for node_type in operators(packed / "model.onnx") if "Lora" in node_type} == set()
        logits(session, "a")
        assert session.adapter_runs == 1


@needs_cpu_operators
def test_a_sequence_without_adapter_reads_none_in_a_mix(adapters, packed):
    with Session.open(packed) as session:
        expected = decoded(session, [None])[0]
        load_all(session, {"a": adapters["a"], "b": adapters["b"]})
        session._table.arrays["adapter.1"][:] = np.nan  # of b
        np.testing.assert_array_equal(decoded(session, ["a", None])[1], expected)


def operators(path):
    import onnx

    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


# Slots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "precision"), [CPU_INT8, ("native", "fp32"), ("ort", "int8")])
def test_loading_and_unloading_change_no_other_adapter(adapters, bundles, target, precision):
    with Session.open(bundles(target, precision)) as session:
        base_logits = logits(session, None)
        session.load_adapter("a", adapters["a"])
        expected = logits(session, "a")
        session.load_adapter("b", adapters["b"])
        other = logits(session, "b")
        np.testing.assert_allclose(logits(session, "a"), expected, atol=1e-5)
        session.unload_adapter("a")
        assert list(session.adapters) == ["b"]
        np.testing.assert_allclose(logits(session, "b"), other, atol=1e-5)
        session.load_adapter("a again", adapters["a"])
        np.testing.assert_allclose(logits(session, "a again"), expected, atol=1e-5)
        np.testing.assert_allclose(logits(session, None), base_logits, atol=1e-5)
        for name in list(session.adapters):
            session.unload_adapter(name)
        np.testing.assert_array_equal(logits(session, None), base_logits)


def test_slots_know_their_adapter(adapters, bundles):
    with Session.open(bundles("native", "fp32")) as session:
        load_all(session, {"a": adapters["a"], "b": adapters["b"]})
        session.use_adapter(0, "a")
        session.prefill(0, IDS)
        with pytest.raises(SlotError, match="slot 0 is in use"):
            session.use_adapter(0, "b")
        with pytest.raises(SlotError, match="slot 0 has the adapter 'a'; release"):
            session.unload_adapter("a")
        session.use_adapter(1, "b")
        with pytest.raises(SlotError, match="slot 0 has a, but slot 1 has b"):
            session.copy_prefix(0, 1, 5)
        session.copy_prefix(0, 2, 5)
        assert session.adapter_of(2) == "a"
        session.truncate(0, 4)
        expected = session.prefill(0, IDS[4:], "all")
        np.testing.assert_allclose(session.prefill(2, IDS[5:], "all"), expected[1:], atol=1e-5)
        with pytest.raises(RequestError, match="no adapter 'c' is loaded; loaded are: a, b"):
            session.use_adapter(3, "c")
        for slot in (0, 2):
            session.release(slot)
        session.unload_adapter("a")
        with pytest.raises(RequestError, match="loaded are: b"):
            session.use_adapter(0, "a")


def test_the_sessions_adapter_is_that_of_every_sequence(adapters, bundles):
    with Session.open(bundles("native", "fp32")) as session:
        session.load_adapter("a", adapters["a"])
        expected = logits(session, "a")
        session.adapter = "a"
        np.testing.assert_array_equal(np.concatenate(list(session.score(IDS))), expected)
        assert next(iter(session.generate(IDS))).id == expected[-1].argmax()
        session.adapter = None
        assert np.abs(np.concatenate(list(session.score(IDS))) - expected).max() > 0.1


@needs_cpu_operators
def test_memory_is_that_of_the_loaded_ranks(adapters, packed):
    """Rank 3 of a takes what 3 ranks take, although the bundle allows 8."""
    with Session.open(packed) as session:
        session.load_adapter("a", adapters["a"])
        found = session._table.arrays["adapter.0"].nbytes
        sizes = session.manifest.adapter_slots.matrices
        wanted = sum(
            2 * 3 * (inputs + -(-outputs // 64) * 64)
            for name, (outputs, inputs) in sizes.items()
            if name != "lm_head"
        )
        assert found == wanted


# Refusals ----------------------------------------------------------------------------------------

REFUSED = {
    "DoRA": (dict(use_dora=True), "no request can choose; merge it with export --lora"),
    "whole modules": (dict(modules_to_save=["lm_head"]), "whole, which no request can choose; merge it"),
    "biases": (dict(bias="all"), "whole, which no request can choose; merge it"),
    "bias of B": (dict(lora_bias=True), "biases of B .lora_bias., which no request can choose"),
    "the embedding": (dict(target_modules=["embed_tokens"]), "embed_tokens.* no request can choose; merge"),
    "a high rank": (
        dict(r=9),
        "has rank 9 in .*, but this bundle takes at most 8; export it with --lora-rank 9",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_need_a_merge_are_refused(tmp_path, base, bundles, case):
    options, message = REFUSED[case]
    adapter = write_adapter(base, tmp_path / "adapter", **{"target_modules": ["q_proj"], **options})
    rewrite(adapter, lambda found: {key: one for key, one in found.items() if "base_layer" not in key})
    with Session.open(bundles("native", "fp32")) as session:
        with pytest.raises(CheckpointError, match=message) as error:
            session.load_adapter("x", adapter)
        assert "\n" not in str(error.value)
        assert list(session.adapters) == []
        session.score(IDS)


DAMAGED = {
    "another model": (dict(base_model_name_or_path="Qwen/Qwen3-8B"), None, "was trained on"),
    "a missing matrix": ({}, lambda found: dict(list(found.items())[2:]), "lacks"),
    "not finite": ({}, lambda found: {k: t * float("nan") for k, t in found.items()}, "NaN or infinite"),
    "too large": ({}, lambda found: {k: t * 1e30 for k, t in found.items()}, "too large for float16"),
    "other ranks": (dict(r=5), None, "has the ranks 4 and 4"),
    "another method": (dict(peft_type="VERA"), None, "peft_type"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize(("target", "precision"), [CPU_INT8, ("native", "fp32")])
def test_damaged_adapters_are_refused_and_never_half_applied(
    tmp_path, base, adapters, bundles, case, target, precision
):
    config, tensors, message = DAMAGED[case]
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=MATRICES)
    rewrite(adapter, tensors, **config)
    with Session.open(bundles(target, precision)) as session:
        session.load_adapter("a", adapters["a"])
        expected = logits(session, "a")
        with pytest.raises(CheckpointError, match=message):
            session.load_adapter("x", adapter)
        assert list(session.adapters) == ["a"]
        np.testing.assert_array_equal(logits(session, "a"), expected)


def test_names_and_counts_are_checked(adapters, bundles):
    with Session.open(bundles("native", "fp32")) as session:
        load_all(session, adapters)
        with pytest.raises(RequestError, match="all 3 adapter slots of this bundle are in use"):
            session.load_adapter("d", adapters["a"])
        session.unload_adapter("c")
        with pytest.raises(RequestError, match="'a' is loaded already"):
            session.load_adapter("a", adapters["b"])
        with pytest.raises(RequestError, match="the adapter's name is empty"):
            session.load_adapter("", adapters["b"])
        with pytest.raises(RequestError, match="no adapter 'z'"):
            session.unload_adapter("z")


def test_a_bundle_without_slots_says_what_to_do(tmp_path, tiny_checkpoint, adapters):
    export(tiny_checkpoint, tmp_path / "plain", ExportOptions("native", "fp32", parity=False))
    with (
        Session.open(tmp_path / "plain") as session,
        pytest.raises(BundleError, match="takes no adapters at run time; export it with --lora-slots"),
    ):
        session.load_adapter("a", adapters["a"])


def test_names_of_released_models_decide(tmp_path, adapters):
    """The released 32B models have equal shapes."""
    base = write_checkpoint(tmp_path / "GLM-Z1-32B-0414", tiny_config(intermediate_size=128))
    export(base, tmp_path / "bundle", ExportOptions("native", "fp32", lora_slots=2, parity=False))
    other = shutil.copytree(adapters["a"], tmp_path / "other")
    rewrite(other, base_model_name_or_path="THUDM/GLM-4-32B-0414")
    with Session.open(tmp_path / "bundle") as session:
        session.load_adapter("a", adapters["a"])
        with pytest.raises(
            CheckpointError, match=r"was trained on .*GLM-4-32B-0414.*, not on glm-z1-32b-0414"
        ):
            session.load_adapter("b", other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target="tensorrt-rtx"), "take --target cpu, ort or native"),
        (dict(target="native", task="encoder"), "take --task causal-lm"),
        (dict(target="ort", precision="bf16"), "take --activations fp32 or fp16"),
        (dict(target="native", lora_rank=5000), "--lora-rank is 5000, but must be 1 ... 1024"),
        (dict(target="native", lora_slots=300), "--lora-slots is 300, but must be 1 ... 256"),
    ],
)
def test_exports_that_cannot_take_adapters(tmp_path, base, options, message):
    with pytest.raises(ExportError, match=message):
        export(base, tmp_path / "bundle", ExportOptions(**{"lora_slots": 2, "parity": False, **options}))
