"""The rotary embedding's parameters, in the forms of all transformers releases."""

import json

import pytest
import torch
import transformers
from checkpoints import config_refusal, parse_config, tiny_config

from glm4_exporters.config import Glm4Config
from glm4_exporters.rope import RopeParameters

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_old_and_new_form_are_one():
    new = tiny_config(
        rope_theta=None,
        partial_rotary_factor=None,
        torch_dtype=None,
        dtype="float32",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    )
    assert Glm4Config.from_dict(new) == parse_config(rope_theta=500, partial_rotary_factor=0.25)


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_yarn_in_either_form(section, key):
    scaling = {key: "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": None}
    rope = parse_config(**{section: scaling}).rope
    assert rope == RopeParameters(10000.0, 0.5, "yarn", 4.0, 64)
    assert isinstance(rope.factor, float)


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({}, 256),
        ({"rope_scaling": YARN}, 256),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 256}}, 1024),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 1024),
        ({"rope_scaling": YARN | {"factor": None}}, 256),
        ({"rope_scaling": YARN | {"factor": 2.5, "original_max_position_embeddings": 255}}, 637),
        ({"rope_scaling": YARN | {"factor": 2.0}, "max_position_embeddings": 512}, 512),
        ({"rope_scaling": YARN | {"factor": None, "original_max_position_embeddings": 3}, "max_position_embeddings": 100}, 100),
        (
            {
                "rope_scaling": YARN | {"original_max_position_embeddings": 32768},
                "max_position_embeddings": 32768,
            },
            131072,
        ),
    ],
)  # fmt: skip
def test_yarn_makes_room_for_factor_times_the_original_positions(changes, positions):
    assert parse_config(**changes).positions == positions


# As transformers means it


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 500.0, "partial_rotary_factor": 0.25},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"factor": None}},
        {"rope_scaling": YARN | {"original_max_position_embeddings": 256}},  # as the released README has it
        {"rope_scaling": YARN | {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5, "factor": 3}},
        {"rope_scaling": YARN | {"rope_theta": 300.0, "partial_rotary_factor": 1.0}, "rope_theta": 300.0,
         "partial_rotary_factor": 1.0},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 32},
    ],
)  # fmt: skip
def test_rotary_frequencies_are_transformers(changes):
    from glm4_exporters.reference import inverse_frequencies

    mapping = tiny_config(**changes)
    theirs = transformers.Glm4Config(**json.loads(json.dumps(mapping)))
    rotary = transformers.models.glm4.modeling_glm4.Glm4RotaryEmbedding(theirs)
    frequencies, factor = inverse_frequencies(Glm4Config.from_dict(mapping))
    torch.testing.assert_close(frequencies, rotary.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(rotary.attention_scaling)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "llama3", "longrope", "su", "mrope"])
def test_other_rope_types(rope_type):
    assert f"rope_type '{rope_type}' is not supported" in config_refusal(
        rope_scaling={"type": rope_type, "factor": 2.0}
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "yarn without a factor"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "must be at least 1"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling.factor is"),
        ({"rope_scaling": YARN | {"factor": 1e9}}, "makes 6.4e+10 positions, more than 2147483647"),
        ({"rope_scaling": YARN | {"factor": 1e308}}, "makes inf positions"),
        ({"rope_scaling": YARN | {"factor": None, "original_max_position_embeddings": 512}}, "factor is 0.5"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "must be 1 ... 2147483647"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 10**4000}},
            "must be an integer of 64 bits",
        ),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 2**62}}, "must be 1 ... 2147483647"),
        (
            {"rope_scaling": YARN | {"factor": None}, "max_position_embeddings": 10**4000},
            "max_position_embeddings is 1000",
        ),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor is -1.0"),
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "the fast one must be the larger"),
        ({"rope_scaling": YARN | {"beta_fast": 1e-320, "beta_slow": 1e-320}}, "must be 0.001 ... 1e+06"),
        (
            {"rope_scaling": YARN | {"attention_factor": 1e300}},
            "attention_factor is 1e+300, but must be 0.001 ... 1000",
        ),
        (
            {"rope_scaling": YARN | {"mscale": -5.0, "mscale_all_dim": 1.0}},
            "mscale is -5.0, but must be 0 ... 1000",
        ),
        ({"rope_scaling": YARN | {"truncate": 1}}, "rope_scaling.truncate is 1"),
        ({"rope_scaling": YARN | {"finetuned": True}}, "holds finetuned, which yarn does not use"),
        ({"rope_scaling": YARN | {"type": "linear"}}, 'two types, "yarn" and "linear"'),
        ({"rope_scaling": {"factor": 4.0}}, "or set rope_type to 'yarn'"),
        ({"rope_scaling": 4.0}, "rope_scaling is 4.0, but must be an object or null"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "said twice, as 500.0 and 10000.0",
        ),
        ({"rope_parameters": YARN, "rope_scaling": YARN | {"factor": 2.0}}, "keep rope_parameters alone"),
    ],
)
def test_contradictory_rope(changes, reason):
    assert reason in config_refusal(**changes)


def test_both_forms_at_once_only_where_transformers_reads_the_same():
    def both(theta):
        parameters = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
        return dict(
            rope_theta=None, partial_rotary_factor=None, rope_scaling=YARN, rope_parameters=parameters
        )

    assert parse_config(**both(10000.0)) == parse_config(rope_scaling=YARN)
    assert "said twice" in config_refusal(**both(500.0))
