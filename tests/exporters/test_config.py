"""``config.json`` in, :class:`Glm4Config` out: what is read, what is guessed, and what is refused."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers
from checkpoints import config_refusal, parse_config, tiny_config

from glm4_exporters.architecture import parameter_count
from glm4_exporters.config import TASK_OF_ARCHITECTURE, TASKS, Glm4Config
from glm4_exporters.rope import RopeParameters
from glm4_runtime.errors import ConfigError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
RELEASED = {
    # hidden, layers, heads, kv heads, intermediate, bias, positions -> parameters, KV bytes a token in fp16
    "9b": (4096, 40, 32, 2, 13696, True, 32768, 9_400_279_040, 40 * 1024),
    "32b": (6144, 61, 48, 2, 23040, False, 32768, 32_566_081_536, 61 * 1024),
    "rumination": (6144, 61, 48, 8, 23040, False, 131072, 33_141_749_760, 244 * 1024),
}


def released(size):
    hidden, layers, heads, kv_heads, intermediate, bias, positions, *_ = RELEASED[size]
    return parse_config(
        vocab_size=151552, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, attention_bias=bias, head_dim=128,
        max_position_embeddings=positions, eos_token_id=[151329, 151336, 151338], pad_token_id=151329,
    )  # fmt: skip


# What is read


def test_every_field_is_read():
    config = parse_config(
        attention_dropout=0.1, initializer_range=0.5, use_cache=False, tie_word_embeddings=True, bos_token_id=7,
        problem_type="regression", torch_dtype="bfloat16", id2label={"0": "no", "1": "yes", "2": "maybe"},
    )  # fmt: skip
    assert config == Glm4Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5, attention_bias=True,
        eos_token_id=(1, 2, 3), rope=RopeParameters(10000.0, 0.5), hidden_act="silu", attention_dropout=0.1,
        initializer_range=0.5, use_cache=False, tie_word_embeddings=True, pad_token_id=0, bos_token_id=7,
        id2label=("no", "yes", "maybe"), problem_type="regression", architectures=("Glm4ForCausalLM",),
        dtype="bfloat16",
    )  # fmt: skip
    assert (config.num_labels, config.task, config.rotary_dim, config.scale) == (3, "causal-lm", 8, 0.25)


@pytest.mark.parametrize("size", RELEASED)
def test_sizes_of_the_released_models(size):
    *_, parameters, kv_bytes = RELEASED[size]
    config = released(size)
    assert parameter_count(config) == parameters
    assert config.kv_bytes_per_token(2) == kv_bytes
    assert (config.rotary_dim, config.scale) == (64, 128**-0.5)


def test_each_task_of_a_manifest_has_an_architecture():
    assert tuple(TASK_OF_ARCHITECTURE.values()) == TASKS


def test_absent_fields_with_a_safe_default():
    absent = (
        "attention_dropout", "use_cache", "initializer_range", "tie_word_embeddings", "head_dim", "rope_theta",
        "partial_rotary_factor", "pad_token_id", "torch_dtype", "architectures",
    )  # fmt: skip
    config = parse_config(**dict.fromkeys(absent))
    assert config == dataclasses.replace(parse_config(), pad_token_id=None, dtype=None, architectures=())
    assert (config.task, config.num_labels) == (None, 2)


def test_one_end_of_sequence_token_or_several():
    assert parse_config(eos_token_id=5).eos_token_id == (5,)
    assert parse_config(eos_token_id=[5, 6]).eos_token_id == (5, 6)


def test_labels_are_in_the_order_of_their_numbers():
    names = {str(i): f"label {i}" for i in reversed(range(11))}
    assert parse_config(id2label=names).id2label == tuple(f"label {i}" for i in range(11))
    assert parse_config(num_labels=3).id2label == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize(
    "changes", [{}, {"rope_scaling": YARN}, {"tie_word_embeddings": True, "attention_bias": False}]
)
def test_what_transformers_saves_is_read(tmp_path, changes, labels):
    mapping = tiny_config(**changes, num_labels=labels)
    transformers.Glm4Config(**json.loads(json.dumps(mapping))).save_pretrained(tmp_path)
    assert Glm4Config.from_file(tmp_path / "config.json") == Glm4Config.from_dict(mapping)


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN | {"mscale": 0.5}}, {"id2label": {"0": "a"}}])
def test_transformers_reads_what_we_write(tmp_path, changes):
    config = parse_config(**changes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.Glm4Config)
    assert Glm4Config.from_dict(theirs.to_dict()) == config


# Files


def test_round_trip_is_stable():
    config = parse_config(
        rope_scaling=YARN | {"attention_factor": 1.1}, id2label={"0": "a", "1": "b", "2": "c"}
    )
    written = config.to_dict()
    assert Glm4Config.from_dict(json.loads(json.dumps(written))) == config
    assert list(written) == sorted(written)
    shuffled = dict(reversed(tiny_config().items()))
    assert json.dumps(Glm4Config.from_dict(shuffled).to_dict()) == json.dumps(parse_config().to_dict())


def test_generation_config_decides_the_end_of_sequence(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config(eos_token_id=[1])))
    assert Glm4Config.from_file(path).eos_token_id == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5], "temperature": 0.6}')
    assert Glm4Config.from_file(path).eos_token_id == (4, 5)
    path.write_text(json.dumps(tiny_config(eos_token_id=None)))
    assert Glm4Config.from_file(path).eos_token_id == (4, 5)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    with pytest.raises(ConfigError, match="eos_token_id missing"):
        Glm4Config.from_file(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no JSON"),
        (b'{"model_type": "glm4",', "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"model_type": "glm4", "model_type": "glm4"}', '"model_type" is there twice'),
    ],
)
def test_damaged_files(tmp_path, data, reason):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        Glm4Config.from_file(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: No such file"):
        Glm4Config.from_file(tmp_path / "config.json")


def test_a_refused_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config(head_dim=-1)))
    with pytest.raises(ConfigError, match=r"config\.json: head_dim is -1"):
        Glm4Config.from_file(path)


def test_end_ids_beyond_the_vocabulary_are_kept():
    # transformers writes the family's ids into small models too; an id that never comes ends nothing.
    config = Glm4Config.from_dict(tiny_config(eos_token_id=[151329, 151336, 151338], bos_token_id=151331))
    assert config.eos_token_id == (151329, 151336, 151338)


# What is refused


def test_every_missing_field_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        Glm4Config.from_dict({"model_type": "glm4", "hidden_size": 64, "rms_norm_eps": None})
    for name in (
        "vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "eos_token_id",
    ):  # fmt: skip
        assert name in str(caught.value)
    assert "hidden_size" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["glm4_moe", "chatglm", "glm"])
def test_relatives_are_told_apart(model_type):
    message = config_refusal(model_type=model_type)
    assert message.startswith(f'model_type is "{model_type}" (')
    assert "another architecture" in message
    assert "'glm4'" in message


@pytest.mark.parametrize("model_type", [None, "llama", 4, ["glm4"], {"a": 1}])
def test_other_model_types(model_type):
    assert "'glm4'" in config_refusal(model_type=model_type)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, but must be 1"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
        ({"num_hidden_layers": 10**9}, "must be 1 ... 10000"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"vocab_size": 320.0}, "vocab_size is 320.0, but must be an integer"),
        ({"vocab_size": "320"}, 'vocab_size is "320", but must be an integer'),
        ({"num_hidden_layers": True}, "num_hidden_layers is true, but must be an integer"),
        ({"attention_bias": 1}, "attention_bias is 1, but must be true or false"),
        ({"attention_bias": "true"}, "must be true or false"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 8}, "is not a multiple"),
        ({"head_dim": None, "num_attention_heads": 6}, "say head_dim"),
        ({"head_dim": None, "num_attention_heads": 0}, "say head_dim"),
        ({"head_dim": 18}, "rotates 9 dims"),
        ({"head_dim": 1}, "rotates 0 dims"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, but must be above 0 and at most 1"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor is 0"),
        ({"partial_rotary_factor": True}, "partial_rotary_factor is true, but must be a number"),
        ({"rope_theta": 1}, "must be greater than 1"),
        ({"rope_theta": -1e4}, "rope_theta is -10000.0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, but must be finite"),
        ({"rope_theta": 10**400}, "must be finite"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"rms_norm_eps": 0}, "small and positive"),
        ({"rms_norm_eps": "1e-5"}, "must be a number"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"eos_token_id": [1, -1]}, "eos_token_id is -1, but token ids are 0 ... "),
        ({"pad_token_id": 320}, "pad_token_id 320 is outside the vocabulary of 320 (0 ... 319)"),
        ({"eos_token_id": []}, "eos_token_id names 0 tokens"),
        ({"eos_token_id": [True]}, "must be a token id"),
        ({"eos_token_id": "1"}, "must be a token id"),
        ({"pad_token_id": 320}, "pad_token_id 320 is outside"),
        ({"bos_token_id": 1.0}, "bos_token_id is 1.0, but must be an integer"),
        (
            {"architectures": ["Glm4vForConditionalGeneration"]},
            "'Glm4vForConditionalGeneration' is not supported",
        ),
        ({"architectures": ["Glm4Model", "Glm4ForCausalLM"]}, "leave one"),
        ({"architectures": "Glm4Model"}, "must be a list"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"num_labels": 0}, "num_labels is 0"),
        ({"num_labels": 3, "id2label": {"0": "a"}}, "num_labels is 3, but id2label names 1"),
        ({"id2label": {"1": "a"}}, "id2label must name the labels 0 ... 0"),
        ({"id2label": {"0": 5}}, "each by a string"),
        ({"id2label": ["a"]}, "must be an object"),
    ],
)
def test_impossible_values(changes, reason):
    assert reason in config_refusal(**changes)


def test_a_changed_copy_is_checked_too():
    with pytest.raises(ConfigError, match="num_hidden_layers is 0"):
        dataclasses.replace(parse_config(), num_hidden_layers=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_config().vocab_size = 1


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["yarn", "silu"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "type", "factor"]), inner)
    ),
    max_leaves=4,
)
KEYS = [
    *tiny_config(),
    "rope_scaling",
    "rope_parameters",
    "id2label",
    "num_labels",
    "problem_type",
    "bos_token_id",
]


@hypothesis.given(st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, min_size=1, max_size=3))
def test_any_value_is_read_or_refused_in_one_line(changes):
    try:
        config = Glm4Config.from_dict(tiny_config() | changes)
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017  it may also be read
    else:
        assert Glm4Config.from_dict(config.to_dict()) == config
