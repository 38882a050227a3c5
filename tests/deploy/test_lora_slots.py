"""``export --lora-slots``: adapters that a session loads at run time, chosen for each sequence."""

import itertools
import shutil

import numpy as np
import pytest
from adapters import rewrite, write_adapter
from checkpoints import tiny_config, write_checkpoint
from cpu_operators import CPU_TARGET, needs_cpu_operators

from glm4_deploy.pipeline import ExportOptions, export
from glm4_runtime import Session
from glm4_runtime.errors import BundleError, CheckpointError, ExportError, RequestError, SlotError

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
def test_logits_on_cpu_are_those_of_the_same_base_with_float32_adapters(base, adapters, packed, bundles, name):
    """Target cpu rounds inputs of base products; so does ort, with the same int8 weights."""
    with Session.open(packed) as one, Session.open(bundles("ort", "int8")) as two:
        load_all(one, adapters)
        load_all(two, adapters)
        assert np.abs(logits(one, name) - logits(two, name)).max() < 0.15 * np.abs(logits(one, name)).max()
