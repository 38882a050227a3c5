"""Adapters merged while a checkpoint is read, held against PEFT's own merge."""

import random
import shutil

import pytest
import torch
from adapters import merged_weights, rewrite, write_adapter
from checkpoints import tiny_config, write_checkpoint

from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.adapters.base_model import names_of, require_base
from glm4_runtime.errors import CheckpointError

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
VARIANTS = {
    "one matrix": {},
    "a list": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "a pattern": {"target_modules": r"model\.layers\.1\.(self_attn\.[qk]_proj|mlp\.gate_up_proj)"},
    "all linear": {"target_modules": "all-linear"},
    "rank-stabilized": {"use_rslora": True, "target_modules": MATRICES},
    "ranks by pattern": {
        "target_modules": MATRICES,
        "rank_pattern": {"v_proj": 6, "layers.0.mlp.down_proj": 1},
    },
    "alphas by pattern": {"target_modules": MATRICES, "alpha_pattern": {r"layers\.1\..*": 3, "o_proj": 1}},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "all but one": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "biases": {"target_modules": ["q_proj", "k_proj"], "bias": "all"},
    "bias of B": {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True},
    "DoRA": {"target_modules": MATRICES, "use_dora": True},
    "DoRA, rank-stabilized": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True, "r": 7},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("lora") / "base", tiny_config(), dtype="bfloat16")


def read(base, *adapters, task=None):
    with Checkpoint.load(base, task, adapters) as checkpoint:
        return {name: checkpoint.read(name).float() for name in checkpoint.tensors}


def in_blocks(base, adapters, rows_together):
    """The weights as the writer reads them, from buffers of a few rows."""
    found = {}
    with Checkpoint.load(base, None, adapters) as checkpoint:
        for name, header in checkpoint.tensors.items():
            row = header.nbytes // header.shape[0]
            buffers = [torch.empty(rows_together * row, dtype=torch.uint8) for _ in range(3)]
            blocks = [block.float().clone() for _, block in checkpoint.row_blocks(name, *buffers)]
            found[name] = torch.cat(blocks)
    return found


def require_equal(found, expected):
    """Equal to PEFT's merge in float32, but for the order of sums."""
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.allclose(weight, expected[name].float(), rtol=2e-6, atol=2e-7), name


def require_within_one_bf16(found, base, adapters):
    """PEFT rounds B·A to bfloat16 and the sum once more; we round once, so that a unit of the larger one is between."""
    untouched = merged_weights(base, [], torch.bfloat16)
    for name, weight in merged_weights(base, adapters, torch.bfloat16).items():
        ours, theirs = found[name].bfloat16().float(), weight.float()
        largest = torch.maximum(torch.maximum(ours.abs(), theirs.abs()), untouched[name].float().abs())
        unit = 2.0 ** (torch.floor(torch.log2(largest.clamp(min=1e-30))) - 7)
        assert bool(((ours - theirs).abs() <= unit).all()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merge_is_pefts(tmp_path, base, variant):
    adapter = write_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    found = read(base, (adapter, 1.0))
    require_equal(found, merged_weights(base, [(adapter, 1.0)], torch.float32))
    require_within_one_bf16(found, base, [(adapter, 1.0)])
    changed = [name for name, weight in read(base).items() if not torch.equal(weight, found[name])]
    assert changed


def test_blocks_of_rows_are_the_whole(tmp_path, base):
    adapter = write_adapter(
        base, tmp_path / "adapter", target_modules="all-linear", use_dora=True, bias="all"
    )
    whole = read(base, (adapter, 1.0))
    for rows in (1, 7, 64):
        for name, weight in in_blocks(base, [(adapter, 1.0)], rows).items():
            assert torch.allclose(weight, whole[name], rtol=1e-6, atol=1e-7), name


def test_several_adapters_and_scales(tmp_path, base):
    one = write_adapter(base, tmp_path / "one", seed=1, target_modules=MATRICES)
    two = write_adapter(
        base, tmp_path / "two", seed=2, target_modules=["q_proj", "down_proj"], r=3, use_dora=True
    )
    adapters = [(one, 0.5), (two, 1.0), (one, -1.5)]
    require_equal(read(base, *adapters), merged_weights(base, adapters, torch.float32))


def test_a_scale_of_zero_is_the_base(tmp_path, base):
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=MATRICES)
    found = read(base, (adapter, 0.0))
    for name, weight in read(base).items():
        assert torch.equal(found[name], weight)


def split_gate_and_up(tensors):
    """The adapter of a fused matrix as two, as tools write them that know the family by its older classes."""
    found = {}
    for name, tensor in tensors.items():
        if "gate_up_proj" not in name:
            found[name] = tensor
            continue
        halves = tensor.chunk(2) if "lora_B" in name else (tensor, tensor)
        for half, part in zip(("gate_proj", "up_proj"), halves, strict=True):
            found[name.replace("gate_up_proj", half)] = part.clone()
    return found


def test_gate_and_up_as_halves(tmp_path, base):
    fused = write_adapter(base, tmp_path / "fused", target_modules=["gate_up_proj", "down_proj"])
    halves = shutil.copytree(fused, tmp_path / "halves")
    rewrite(halves, split_gate_and_up, target_modules=["gate_proj", "up_proj", "down_proj"])
    require_equal(read(base, (halves, 1.0)), read(base, (fused, 1.0)))


WRAPPED = {
    "with the adapter's name": lambda name: (
        name.replace(".weight", ".default.weight") if "lora_" in name else name
    ),
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "sharded": lambda name: (
        "_fsdp_wrapped_module." + name.replace("self_attn", "_fsdp_wrapped_module.self_attn")
    ),
    "in a wrapper": lambda name: f"module.{name}",
    "without any": lambda name: name.removeprefix("base_model.model."),
    "of a bare decoder": lambda name: name.replace("base_model.model.model.", "base_model.model."),
}


@pytest.mark.parametrize("way", WRAPPED)
def test_names_as_tools_save_them(tmp_path, base, way):
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    expected = read(base, (adapter, 1.0))
    rewrite(adapter, lambda tensors: {WRAPPED[way](name): tensor for name, tensor in tensors.items()})
    require_equal(read(base, (adapter, 1.0)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_half_precision(tmp_path, base, dtype):
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=MATRICES)
    rewrite(adapter, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    require_within_one_bf16(read(base, (adapter, 1.0)), base, [(adapter, 1.0)])


@pytest.mark.parametrize(
    ("kind", "task"), [("SEQ_CLS", "sequence-classification"), ("TOKEN_CLS", "token-classification")]
)
def test_a_classification_head_on_a_causal_lm(tmp_path, base, kind, task):
    adapter = write_adapter(
        base,
        tmp_path / "adapter",
        task=task,
        num_labels=5,
        task_type=kind,
        target_modules=["q_proj", "v_proj"],
    )
    with Checkpoint.load(base, None, [(adapter, 1.0)]) as checkpoint:
        assert checkpoint.task == task
        assert checkpoint.config.id2label == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")
    found = read(base, (adapter, 1.0))
    assert "lm_head.weight" not in found
    require_equal(found, merged_weights(base, [(adapter, 1.0)], torch.float32, task, num_labels=5))


def test_an_encoder_reads_no_head(tmp_path, base):
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    found, whole = read(base, (adapter, 1.0), task="encoder"), read(base, (adapter, 1.0))
    assert found.keys() == whole.keys() - {"lm_head.weight"}
    assert all(torch.equal(weight, whole[name]) for name, weight in found.items())


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def with_nan(tensors):
    next(iter(tensors.values()))[0] = torch.nan
    return tensors


REFUSED = {
    "another method": ({"peft_type": "LOHA"}, None, "only LORA can be merged"),
    "a module is missing": (
        {},
        without("layers.1.self_attn.q_proj"),
        "lacks model.layers.1.self_attn.q_proj",
    ),
    "half a module": ({}, without("layers.0.self_attn.q_proj.lora_B"), "lacks lora_B of model.layers.0"),
    "a saved module is missing": ({"modules_to_save": ["lm_head"]}, None, "lacks lm_head"),
    "an unknown target": (
        {},
        lambda t: {n.replace("q_proj", "query"): v for n, v in t.items()},
        "lacks model.layers",
    ),
    "tensors that nothing names": (
        {"layers_to_transform": [1]},
        None,
        "holds model.layers.0.self_attn.q_proj, which its adapter_config.json does not name",
    ),
    "one more target": (
        {"target_modules": ["q_proj", "query_key_value"]},
        lambda t: t | {n.replace("q_proj", "query_key_value"): v.clone() for n, v in t.items()},
        "query_key_value.weight, which the model does not have",
    ),
    "no tensor of LoRA": (
        {},
        lambda t: t | {"base_model.model.x.hada_w1_a": torch.ones(2)},
        "not one of LoRA's",
    ),
    "another rank": ({"r": 8}, None, "has the ranks 4 and 4"),
    "no rank": ({"r": 0}, None, "a rank is 1"),
    "another width": ({}, lambda t: {n: torch.cat([v, v], 1) for n, v in t.items()}, "ranks 4 and 8"),
    "other shapes": (
        {},
        lambda t: {n: torch.cat([v, v], 0) if "lora_B" in n else v for n, v in t.items()},
        "but the model has [64, 64]",
    ),
    "not a number": ({}, with_nan, "NaN or infinite"),
    "quantized": ({}, lambda t: {n: v.to(torch.float8_e4m3fn) for n, v in t.items()}, "stores"),
    "DoRA without magnitudes": ({"use_dora": True}, None, "disagree on whether"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, None, "changed base weights"),
    "quantized by groups": ({"use_qalora": True}, None, "cannot be merged here"),
    "layers repeated": ({"layer_replication": [[0, 1], [0, 2]]}, None, "cannot be merged here"),
    "switched on by tokens": ({"alora_invocation_tokens": [5, 6]}, None, "cannot be merged here"),
    "an option of a later release": ({"use_wonders": True}, None, "cannot be merged here"),
    "a slow pattern": ({"target_modules": r"((.|\w)+)+[A-Z]"}, None, "takes too long"),
    "a pattern of other modules": (
        {"target_modules": r".*\.o_proj"},
        None,
        "lacks model.layers.0.self_attn.o_proj",
    ),
    "no pattern": ({"target_modules": "(q_proj"}, None, "cannot be read"),
    "a list of numbers": ({"target_modules": [1, 2]}, None, "must be a list of names"),
    "a text as alpha": ({"lora_alpha": "16"}, None, "must be a number"),
    "another family": ({"base_model_name_or_path": "meta-llama/Llama-3-8B"}, None, "was trained on"),
    "another size": ({"base_model_name_or_path": "THUDM/GLM-4-9B-0414"}, None, "was trained on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, base, case):
    config, tensors, message = REFUSED[case]
    adapter = write_adapter(base, tmp_path / "adapter")
    rewrite(adapter, tensors, **config)
    with pytest.raises(CheckpointError) as refusal:
        read(base, (adapter, 1.0))
    assert message in str(refusal.value)
    assert len(str(refusal.value)) <= 500


def test_a_folder_that_is_no_adapter(tmp_path, base):
    adapter = write_adapter(base, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    for folder, message in (
        (adapter, "is pickled"),
        (base, "has no adapter_config.json"),
        (tmp_path / "x", "has no"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(base, (folder, 1.0))
    with pytest.raises(CheckpointError, match="must be a finite number"):
        read(base, (base, float("nan")))


def test_whole_tensors_have_no_scale_and_one_owner(tmp_path, base):
    adapter = write_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match="has no scale"):
        read(base, (adapter, 0.5))
    with pytest.raises(CheckpointError, match="as another adapter does"):
        read(base, (adapter, 1.0), (adapter, 1.0))


def test_tied_embeddings_are_changed_together_or_not_at_all(tmp_path):
    base = write_checkpoint(tmp_path / "tied", tiny_config(tie_word_embeddings=True))
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(CheckpointError, match="ties the head"):
        read(base, (adapter, 1.0))


@pytest.mark.parametrize(
    ("folder", "base", "right"),
    [
        ("GLM-4-32B-0414", "THUDM/GLM-4-32B-0414", True),
        ("GLM-4-32B-0414", "/train/models/glm-4-32b-0414/", True),
        ("checkpoint", "THUDM/GLM-4-32B-Base-0414", True),  # the names cannot tell, the sizes fit
        ("checkpoint", "/train/base", True),
        ("checkpoint", "someone/my-glm-tune", True),
        ("GLM-4-32B-0414", "THUDM/GLM-4-32B-Base-0414", False),  # equal in all shapes
        ("GLM-Z1-32B-0414", "THUDM/GLM-4-32B-0414", False),
        ("models--THUDM--GLM-Z1-32B-0414/snapshots/c0ffee", "THUDM/GLM-4-32B-0414", False),
        ("models--THUDM--GLM-Z1-32B-0414/snapshots/c0ffee", "zai-org/GLM-Z1-32B-0414", True),
        ("checkpoint", "THUDM/GLM-4-9B-0414", False),
        ("checkpoint", "Qwen/Qwen3-8B", False),
    ],
)
def test_the_base_model_is_the_checkpoint(tmp_path, folder, base, right):
    checkpoint = tmp_path / folder
    checkpoint.mkdir(parents=True)
    ours = names_of(checkpoint), (6144, 61), checkpoint
    if right:
        require_base(tmp_path, base, *ours)
        return
    with pytest.raises(CheckpointError, match="was trained on"):
        require_base(tmp_path, base, *ours)


def random_options(chance):
    heads = chance.sample(MATRICES, chance.randint(1, len(MATRICES)))
    return {
        "r": chance.randint(1, 12),
        "lora_alpha": chance.choice([1, 3, 8, 32]),
        "use_rslora": chance.random() < 0.5,
        "use_dora": chance.random() < 0.3,
        "target_modules": heads,
        "rank_pattern": {heads[0]: chance.randint(1, 9)} if chance.random() < 0.5 else {},
        "alpha_pattern": {f"layers.{chance.randint(0, 1)}.*": chance.randint(1, 9)}
        if chance.random() < 0.5
        else {},
    }


def random_config(chance):
    heads, head_dim = chance.choice([1, 2, 3]), chance.choice([2, 6, 10])
    return tiny_config(
        hidden_size=chance.randint(3, 70),
        intermediate_size=chance.randint(1, 90),
        vocab_size=chance.randint(8, 99),
        num_attention_heads=2 * heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        partial_rotary_factor=1.0,
        attention_bias=chance.random() < 0.5,
    )


def check_random(folder, seed):
    chance = random.Random(seed)
    base = write_checkpoint(
        folder / "base", random_config(chance), dtype=chance.choice(["bfloat16", "float32"])
    )
    adapter = write_adapter(base, folder / "adapter", seed=seed, **random_options(chance))
    adapters = [(adapter, chance.choice([1.0, 0.5, 2.0]))]
    require_equal(read(base, *adapters), merged_weights(base, adapters, torch.float32))


@pytest.mark.parametrize("seed", range(5))
def test_odd_sizes(tmp_path, seed):
    check_random(tmp_path, seed)


@pytest.mark.more
@pytest.mark.parametrize("seed", range(5, 200))
def test_many_odd_sizes(tmp_path, seed):
    check_random(tmp_path, seed)
