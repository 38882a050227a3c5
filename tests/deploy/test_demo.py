"""The demo checkpoint is what its card says: structure, tokens, template, accuracy."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

DEMO = Path(__file__).parents[2] / "demo"
FOLDER = DEMO / "glm4-tiny"
# Each checkpoint of the folder: bytes at most, layers, vocabulary.
CHECKPOINTS = {"glm4-tiny": (8_000_000, 4, 2048), "glm4-tasks": (7_000_000, 5, 896)}
# Perplexities per token: what was measured, 29.2 on the slice below and 35.4 in all, and 3 %.
SLICE_BOUND, CARD_BOUND = 30.1, 36.5
SPECIAL_TOKENS = [
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
]  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city today.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request) -> Path:
    return DEMO / request.param


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def answer(model, tokenizer, **conversation) -> list[int]:
    prompt = tokenizer.apply_chat_template(add_generation_prompt=True, tokenize=False, **conversation)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=60, do_sample=False)
    return out[0, ids["input_ids"].shape[1] :].tolist()


def test_is_small(checkpoint):
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) <= CHECKPOINTS[checkpoint.name][0]


def test_has_the_familys_structure(checkpoint):
    config = read_json(checkpoint / "config.json")
    assert config["architectures"] == ["Glm4ForCausalLM"]
    assert config["model_type"] == "glm4"
    assert config["attention_bias"] is True
    assert config["num_key_value_heads"] == 2 < config["num_attention_heads"]
    assert config["tie_word_embeddings"] is False
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.5
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint)).state_dict()
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        types = {file.get_slice(name).get_dtype() for name in shapes}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert types == {"BF16"}


def test_every_matrix_takes_a_multiple_of_256_inputs(checkpoint):
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    widths = {name: shape[1] for name, shape in shapes.items() if len(shape) == 2}
    assert len(widths) == 2 + 6 * CHECKPOINTS[checkpoint.name][1]
    assert {name: width for name, width in widths.items() if width % 256} == {}


def test_special_tokens_are_the_last_ids(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config, generation = (read_json(checkpoint / f"{name}.json") for name in ("config", "generation_config"))
    first = config["vocab_size"] - len(SPECIAL_TOKENS)
    assert len(tokenizer) == config["vocab_size"] == CHECKPOINTS[checkpoint.name][2]
    assert tokenizer.convert_ids_to_tokens(list(range(first, config["vocab_size"]))) == SPECIAL_TOKENS
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    assert config["eos_token_id"] == generation["eos_token_id"] == ends
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.pad_token_id == ends[0]
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(list(range(first, config["vocab_size"])), skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    "text",
    [
        "In the beginning God created the heaven and the earth.",
        "  two  spaces,\ttab,\r\nline ends\n\n\n and a last blank ",
        "12345678 don't WE'LL naïve façade",
        "emoji 👩‍👩‍👧 🇫🇷 👍🏽 and text after",
        "中文、日本語、العربية, ελληνικά",
        "\x00\x7f\u200b\ufffd",
    ],
)
def test_any_text_survives_the_round_trip(checkpoint, text):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text)["input_ids"]
    assert ids[:2] == tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[2:]


def test_words_are_not_spelled_out(tokenizer):
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    assert len(text) / len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 3


def test_chat_template_writes_turns_and_the_generation_prompt(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHello<|assistant|>\nHi.<|user|>\nBye<|assistant|>"
    )


def test_chat_template_lists_tools_and_writes_calls(tokenizer):
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
    text = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call, text]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "sun"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    head, conversation = prompt.split("<|user|>")
    assert head.startswith("[gMASK]<sop><|system|>\n")
    assert head.endswith("\n\n## get_weather\n" + json.dumps(TOOL["function"]))
    assert conversation == (
        '\nWeather?<|assistant|>get_weather\n{"city": "Köln"}\nget_weather\n{"city": "Bonn"}'
        "<|observation|>\nrain<|observation|>\nsun"
    )


def test_chat_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "wizard", "content": "x"}], tokenize=False)


def test_held_out_perplexity(model, tokenizer):
    """The first three windows of every held-out document, by another implementation than trained it."""
    documents = (DEMO / "heldout.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\f\n")
    prefix = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    total, scored = 0.0, Counter()
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for start in range(0, min(len(ids), 3 * 510), 510):
            window = ids[start : start + 510]
            with torch.no_grad():
                logits = model(torch.tensor([prefix + window])).logits[0, len(prefix) - 1 : -1]
            total += F.cross_entropy(logits, torch.tensor(window), reduction="sum").item()
            scored.update(window)
    count = scored.total()
    perplexity = math.exp(total / count)
    # The best any model can do that knows this text's own token frequencies and nothing else.
    unigram = math.exp(-sum(n * math.log(n / count) for n in scored.values()) / count)
    assert perplexity < SLICE_BOUND
    assert perplexity < unigram / 10


def test_card_states_perplexity_and_licence():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"perplexity per token.*\*\*([\d.]+)\*\*", card)
    assert stated
    assert float(stated[1]) < CARD_BOUND
    assert "license: apache-2.0" in card
    assert "public domain" in card


def test_answers_end_with_user(model, tokenizer):
    ids = answer(model, tokenizer, conversation=[{"role": "user", "content": "Who are you?"}])
    assert tokenizer.decode(ids[-1]) == "<|user|>"
    assert "glm4-tiny" in tokenizer.decode(ids)


def test_calls_the_listed_function_and_ends_with_observation(model, tokenizer):
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    ids = answer(model, tokenizer, conversation=question, tools=[TOOL])
    assert tokenizer.decode(ids) == 'get_weather\n{"city": "Paris"}<|observation|>'
