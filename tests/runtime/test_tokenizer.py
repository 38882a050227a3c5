"""The tokenizer's two directions, text that comes token by token, and stop strings."""

import json

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from glm4_runtime.errors import BundleError, RequestError
from glm4_runtime.stop_strings import StopStrings
from glm4_runtime.tokenizer import TextStream, Tokenizer

SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>"]
CORPUS = ["the cat sat on the mat", "你好，世界。你好！", "naïve café", "🙂🙂 👩‍👩‍👧", "12345 2024"] * 3
SAMPLES = [
    "",
    "hello the cat",
    "你好，世界",
    "naïve café — ok",
    "🙂 👩‍👩‍👧‍👦 done",
    "𝒳 Ωμέγα",
    "a\ufffdb",
    "\ufffd\ufffd",
    " \n\t x",
]


def backend(train=True):
    """Byte-level BPE with GLM-4's prefix; untrained, every byte is a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if train:
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
        made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens(SPECIAL)
    made.add_tokens(["<think>"])
    prefix = [(token, made.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
    made.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=prefix)
    return made


TRAINED = Tokenizer(backend())
BYTES = Tokenizer(backend(train=False))


def byte_ids(data):
    """Tokens of the untrained tokenizer for these bytes, UTF-8 or not."""
    spelled = {b: BYTES.encode(bytes([b]).decode(), add_special_tokens=False)[0] for b in range(128)}
    for b in range(128, 256):
        # the byte-level alphabet spells printable Latin-1 as itself and moves the rest up from U+0100
        moved = [x for x in range(256) if not (33 <= x <= 126 or 161 <= x <= 172 or 174 <= x <= 255)]
        spelled[b] = BYTES.id_of(chr(256 + moved.index(b)) if b in moved else chr(b))
    return [spelled[b] for b in data]


def streamed(tokenizer, ids, **options):
    stream = TextStream(tokenizer, **options)
    pieces = [stream.push(token) for token in ids]
    return pieces, stream.flush()


@pytest.fixture
def folder(tmp_path):
    backend().save(str(tmp_path / "tokenizer.json"))
    config = {
        "eos_token": "<|endoftext|>",
        "pad_token": {"content": "<|endoftext|>", "lstrip": False},
        "bos_token": None,
        "model_max_length": 128000,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("text", SAMPLES)
def test_text_comes_back(text):
    assert TRAINED.decode(TRAINED.encode(text)) == text


def test_the_prefix_comes_from_the_file_and_never_twice():
    prefix = [TRAINED.id_of("[gMASK]"), TRAINED.id_of("<sop>")]
    bare = TRAINED.encode("the cat", add_special_tokens=False)
    assert bare[:2] != prefix
    assert TRAINED.encode("the cat") == prefix + bare
    assert TRAINED.encode("[gMASK]<sop>the cat") == prefix + bare
    assert TRAINED.encode("[gMASK]<sop>the cat", add_special_tokens=False) == prefix + bare


def test_a_folder_gives_the_special_tokens_and_their_roles(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.special_tokens == {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    assert {tokenizer.token_of(token) for token in tokenizer.special_ids} == set(SPECIAL)
    assert tokenizer.id_of("<think>") == tokenizer.vocab_size - 1
    ids = tokenizer.encode("<|user|>hi<think>")
    assert tokenizer.decode(ids) == "hi<think>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "[gMASK]<sop><|user|>hi<think>"


def test_the_config_is_optional(folder):
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(str(folder)).special_tokens == {}


def test_a_files_truncation_and_padding_are_ignored(folder):
    cutting = backend()
    cutting.enable_truncation(3)
    cutting.enable_padding(length=64)
    cutting.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_folder(folder).encode("one two three") == TRAINED.encode("one two three")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
    ],
)
def test_a_missing_or_damaged_file_is_named(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        Tokenizer.from_folder(folder)


def test_what_has_no_token_or_is_no_text_is_refused():
    with pytest.raises(RequestError, match="nonesuch"):
        TRAINED.id_of("nonesuch")
    for token in (-1, TRAINED.vocab_size, 2**40):
        with pytest.raises(RequestError, match=str(token)):
            TRAINED.token_of(token)
    with pytest.raises(RequestError, match="surrogate"):
        TRAINED.encode("ab\ud83d")


@pytest.mark.parametrize("tokenizer", [TRAINED, BYTES])
@pytest.mark.parametrize("text", SAMPLES)
def test_a_stream_gives_the_text_in_whole_characters(tokenizer, text):
    pieces, rest = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) + rest == text
    assert rest in ("", "\ufffd")  # only a replacement character at the very end has to wait
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_a_character_appears_with_its_last_byte():
    pieces, rest = streamed(BYTES, byte_ids("é🙂a".encode()))
    assert pieces == ["", "é", "", "", "", "🙂", "a"]
    assert rest == ""


def test_a_real_replacement_character_waits_for_one_token_only():
    pieces, rest = streamed(BYTES, byte_ids(b"\xff\xffa\xe4\xb8"))
    assert pieces == ["", "\ufffd", "\ufffda", "", ""]
    assert rest == "\ufffd"


def test_special_tokens_between_bytes_do_not_disturb():
    first, second, third = byte_ids("中".encode())
    user, unknown = BYTES.id_of("<|user|>"), BYTES.vocab_size + 100
    assert streamed(BYTES, [first, user, unknown, second, user, third]) == (["", "", "", "", "", "中"], "")
    shown, rest = streamed(BYTES, [first, user, second], skip_special_tokens=False)
    assert "".join(shown) + rest == "\ufffd<|user|>\ufffd"


TOKEN_BYTES = st.sampled_from([b"a", b" ", "é".encode(), "中".encode(), "🙂".encode(), "\ufffd".encode()])
RAGGED = st.lists(TOKEN_BYTES | st.binary(max_size=3), max_size=40).map(b"".join)


@given(RAGGED)
@example(b"\xf0" * 100)
@example(b"\x80" * 100)
@example(b"\xf0\x9f\x99" * 40)
@example("\ufffd".encode() * 60 + b"\xe4")
@settings(max_examples=400, deadline=None)
def test_any_bytes_stream_to_what_they_decode_to(data):
    ids = byte_ids(data)
    pieces, rest = streamed(BYTES, ids)
    assert "".join(pieces) + rest == BYTES.decode(ids) == data.decode(errors="replace")


@given(st.lists(st.integers(0, TRAINED.vocab_size + 3), max_size=60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_tokens_stream_to_what_they_decode_to(ids, skip):
    pieces, rest = streamed(TRAINED, ids, skip_special_tokens=skip)
    assert "".join(pieces) + rest == TRAINED.decode(ids, skip_special_tokens=skip)


def test_a_decoder_that_trims_the_start_keeps_its_spaces():
    words = ["▁the", "▁cat", "s", "▁sat"]
    made = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="s"))
    made.decoder = decoders.Metaspace()
    pieces, rest = streamed(Tokenizer(made), [0, 1, 2, 3])
    assert pieces == ["the", " cat", "s", " sat"]
    assert rest == ""


@pytest.mark.parametrize(
    "data", [b"plain text " * 100, b"\xf0\x9f\x99" * 400, b"\x80" * 1000, "🙂".encode() * 250]
)
def test_the_work_for_a_token_does_not_grow_with_the_text(data, monkeypatch):
    lengths = []
    decode = BYTES.decode
    monkeypatch.setattr(BYTES, "decode", lambda ids, skip: lengths.append(len(ids)) or decode(ids, skip))
    streamed(BYTES, byte_ids(data))
    assert max(lengths) <= 40
    assert len(lengths) <= 4 * len(data)


def test_a_flushed_stream_starts_over():
    stream = TextStream(BYTES)
    first, second, third = byte_ids("中".encode())
    assert stream.push(first) + stream.flush() == "\ufffd"
    assert [stream.push(token) for token in (first, second, third)] == ["", "", "中"]


def stopped_text(stops, pieces):
    """What is shown of the pieces, and whether a stop string ended it."""
    watch, shown = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = watch.push(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + watch.flush(), False


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["END"], "the END of", "the "),
        (["END"], "the EN", "the EN"),
        (["aab"], "aaab", "a"),
        (["cd", "b"], "abcd", "a"),
        (["abcd", "c"], "abcd", "ab"),  # the first to be complete
        (["cd", "abcd"], "xabcd", "x"),  # complete together: the longest
        (["你好"], "说你你好", "说你"),
        ([], "anything", "anything"),
    ],
)
def test_text_is_cut_before_the_first_stop_string(stops, text, shown):
    for pieces in ([text], list(text), [text[:2], "", text[2:]]):
        assert stopped_text(stops, pieces) == (shown, shown != text)


def test_only_a_possible_beginning_is_held_back():
    watch = StopStrings(["\n\nUser:", "##"])
    assert watch.push("fine\n") == ("fine", False)
    assert watch.push("\nUse") == ("", False)
    assert watch.push("ful #") == ("\n\nUseful ", False)
    assert watch.push("1") == ("#1", False)
    assert watch.flush() == ""


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_see_one_text_whatever_its_pieces(stops, pieces):
    text = "".join(pieces)
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    longest = max((len(stop) for stop in stops if ends and text[: ends[0]].endswith(stop)), default=0)
    expected = (text[: ends[0] - longest], True) if ends else (text, False)
    assert stopped_text(stops, pieces) == expected
