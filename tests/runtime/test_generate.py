"""Generation over a scripted model: what is shown, where it ends, and which steps the model takes."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from glm4_runtime.errors import RequestError
from glm4_runtime.generate import Token, Vocabulary, generate
from glm4_runtime.sampling import SamplingParams
from glm4_runtime.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
EOS, USER = len(ALPHABET), len(ALPHABET) + 1
VOCAB = len(ALPHABET) + 8  # padded, as the model's logits are


def byte_tokenizer():
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|user|>"])
    return Tokenizer(made)


TOKENIZER = byte_tokenizer()


class Script:
    """A model whose likeliest next token is always the script's next; it notes every step it takes."""

    def __init__(self, ids, room=1000):
        self.ids = list(ids)
        self.capacity = room
        self.taken = []
        self.calls = []

    def room(self):
        return self.capacity - len(self.taken)

    def prefill(self, ids):
        assert not self.calls
        return self._step("prefill", ids)

    def decode(self, token):
        return self._step("decode", [token])

    def _step(self, name, ids):
        assert len(ids) <= self.room()
        self.taken += ids
        logits = np.zeros(VOCAB, np.float32)
        logits[self.ids[len(self.calls)]] = 10
        self.calls.append(name)
        return logits


def ids_of(text):
    return TOKENIZER.encode(text)


def run(script, tokenizer=TOKENIZER, prompt=(1, 2, 3), eos=(EOS, USER), max_len=500, **params):
    model = script if isinstance(script, Script) else Script(script)
    tokens = list(
        generate(model, Vocabulary(VOCAB, tokenizer, eos), SamplingParams(**params), list(prompt), max_len)
    )
    # whatever happened: one prefill, then a step for every token but the last
    assert model.calls == ["prefill"] + ["decode"] * (len(tokens) - 1)
    assert model.taken == [*prompt, *(token.id for token in tokens[:-1])]
    assert [token.finish_reason is None for token in tokens] == [True] * (len(tokens) - 1) + [False]
    return tokens


def shown(tokens):
    return "".join(token.text for token in tokens)


@pytest.mark.parametrize("end", [EOS, USER])
def test_any_end_of_sequence_ends_it_and_is_not_shown(end):
    tokens = run([*ids_of("hi 🙂"), end])
    assert [token.id for token in tokens] == [*ids_of("hi 🙂"), end]
    assert [token.text for token in tokens] == ["h", "i", " ", "", "", "", "🙂", ""]
    assert tokens[-1].finish_reason == "stop"


def test_half_a_character_comes_with_the_end():
    for tokens in (run([*ids_of("🙂")[:2], EOS]), run(ids_of("🙂")[:2], max_tokens=2)):
        assert shown(tokens) == tokens[-1].text == "\ufffd"


def test_ends_can_be_ignored_but_not_stop_tokens():
    script = [EOS, *ids_of("a"), USER, *ids_of("b!c")]
    tokens = run(script, ignore_eos=True, stop_token_ids=ids_of("!"))
    assert shown(tokens) == "ab"
    assert tokens[-1] == Token(ids_of("!")[0], "", tokens[-1].logprob, "stop")
    assert [token.id for token in run(script, ignore_eos=True, stop_token_ids=[USER])] == script[:3]


def test_the_first_token_may_be_the_last():
    assert [dataclasses.replace(token, logprob=0.0) for token in run([EOS])] == [Token(EOS, "", 0.0, "stop")]
    assert [token.finish_reason for token in run(ids_of("abc"), max_tokens=1)] == ["length"]


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({"max_tokens": 4}, 4),
        ({"max_len": 3 + 5}, 5),
        ({"max_tokens": 9, "max_len": 3 + 5}, 5),
        ({"max_tokens": 2, "max_len": 3 + 5}, 2),
    ],
)
def test_length_limits(limits, count):
    tokens = run(ids_of("abcdefghijkl"), **limits)
    assert shown(tokens) == "abcdefghijkl"[:count]
    assert tokens[-1].finish_reason == "length"


def test_a_full_slot_ends_it():
    """Three of five places go to the prompt, two to tokens; the one after those is taken but never fed."""
    tokens = run(Script(ids_of("abcdef"), room=5))
    assert (shown(tokens), tokens[-1].finish_reason) == ("abc", "length")
    assert run(Script([*ids_of("ab"), EOS], room=5))[-1].finish_reason == "stop"


def test_a_stop_string_is_cut_off_and_its_beginning_held_back():
    tokens = run(ids_of("one two.END."), stop="END")
    assert shown(tokens) == "one two."
    assert [token.text for token in tokens[-3:]] == ["", "", ""]
    assert (tokens[-1].finish_reason, tokens[-1].stop) == ("stop", "END")
    assert {token.stop for token in tokens[:-1]} == {None}
    assert tokens[-1].id == ids_of("D")[0]


def test_what_was_held_back_comes_with_the_end():
    held = run([*ids_of("one EN"), EOS], stop=["END"])
    assert [token.text for token in held[-3:]] == ["", "", "EN"]
    assert (held[-1].finish_reason, held[-1].stop) == ("stop", None)
    cut = run(ids_of("one END"), stop=["END"], max_tokens=6)
    assert (cut[-1].text, cut[-1].finish_reason) == ("EN", "length")


def test_a_stop_string_on_the_last_token_is_a_stop():
    tokens = run(ids_of("one!"), stop=["x", "!"], max_tokens=4)
    assert (shown(tokens), tokens[-1].finish_reason, tokens[-1].stop) == ("one", "stop", "!")
    tokens = run(ids_of("one🙂")[:5], stop="\ufffd", max_tokens=5)  # known only once nothing can follow
    assert (shown(tokens), tokens[-1].finish_reason) == ("one", "stop")


def test_it_works_on_ids_alone():
    tokens = run([5, 6, 7, EOS], tokenizer=None)
    assert [(token.id, token.text) for token in tokens] == [(5, ""), (6, ""), (7, ""), (EOS, "")]


def test_tokens_carry_the_models_log_probability():
    expected = 10 - np.log(np.exp(10) + VOCAB - 1)
    assert [token.logprob for token in run([5, EOS])] == pytest.approx([expected] * 2, abs=1e-5)


def test_the_seed_decides_the_output():
    def ids(seed):
        tokens = run(range(30), max_tokens=30, temperature=3, seed=seed, ignore_eos=True)
        return [token.id for token in tokens]

    assert ids(1) == ids(1) != ids(2)


def test_the_model_is_never_ahead_of_the_reader():
    model = Script(ids_of("abcdef"))
    tokens = generate(model, Vocabulary(VOCAB, TOKENIZER, [EOS]), SamplingParams(), [1], 100)
    assert model.calls == []
    assert next(tokens).text == "a"
    assert model.calls == ["prefill"]
    assert next(tokens).text == "b"
    tokens.close()
    assert model.calls == ["prefill", "decode"]
    assert list(tokens) == []
    generate(model, Vocabulary(VOCAB, TOKENIZER, [EOS]), SamplingParams(), [1], 100).close()  # never started


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ()}, "empty"),
        ({"prompt": (1,) * 500}, "limit is 500"),
        ({"prompt": (VOCAB,)}, f"from 0 to {VOCAB - 1}"),
        ({"prompt": (1,) * 11}, "room for 10"),
        ({"tokenizer": None, "stop": "x"}, "stop_token_ids"),
        ({"logit_bias": {VOCAB: 1}}, "logit_bias"),
    ],
)
def test_what_cannot_be_served_is_refused_before_any_step(options, message):
    model = Script([EOS], room=10)
    options = {"prompt": (1,), "tokenizer": TOKENIZER, **options}
    prompt, tokenizer = options.pop("prompt"), options.pop("tokenizer")
    with pytest.raises(RequestError, match=message):
        generate(model, Vocabulary(VOCAB, tokenizer, [EOS]), SamplingParams(**options), prompt, 500)
    assert model.calls == []


@given(
    st.text("ab🙂中\ufffd", min_size=1, max_size=12),
    st.lists(st.text("ab中", min_size=1, max_size=3), max_size=2),
)
@settings(max_examples=150, deadline=None)
def test_the_texts_add_up(text, stops):
    tokens = run([*ids_of(text), EOS], stop=stops)
    cuts = [text[:n] for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    assert tokens[-1].finish_reason == "stop"
    if cuts:
        longest = max(len(stop) for stop in stops if cuts[0].endswith(stop))
        assert shown(tokens) == cuts[0][:-longest]
    else:
        assert shown(tokens) == text
