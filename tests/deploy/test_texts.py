"""Text, lines and ids become the same kind of sequences, and what is none is refused by line."""

import json
from pathlib import Path

import pytest

from glm4_deploy import texts
from glm4_deploy.texts import cut_text, random_sequences, read_sequences
from glm4_runtime.errors import TextError
from glm4_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "demo/glm4-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(DEMO)


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return path


def test_text_is_cut_and_every_sequence_begins_with_the_prefix(tmp_path, tokenizer):
    text = "One line of words, and 37 more.\n" * 40
    prefix, ids = tokenizer.encode(""), tokenizer.encode(text, add_special_tokens=False)
    assert prefix  # else this test says nothing
    found = read_sequences(written(tmp_path, "a.txt", text), tokenizer, 32, 1000)
    assert all(one[: len(prefix)] == prefix for one in found)
    assert [i for one in found for i in one[len(prefix) :]] == ids
    assert {len(one) for one in found[:-1]} == {32}
    assert read_sequences(tmp_path / "a.txt", tokenizer, 32, 3) == found[:3]
    assert cut_text(text, tokenizer, 32) == found


def test_a_long_text_is_read_in_parts(tmp_path, tokenizer, monkeypatch):
    path = written(tmp_path, "a.txt", "".join(f"Line {i} says {i * i}.\n" for i in range(200)))
    whole = read_sequences(path, tokenizer, 50, 1000)
    monkeypatch.setattr(texts, "READ_CHARACTERS", 100)
    assert read_sequences(path, tokenizer, 50, 1000) == whole


def test_lines_are_documents(tmp_path, tokenizer):
    lines = ["What a day", {"text": "it was."}, [5, 6, 7, 8, 9], {"input_ids": [1, 2]}]
    path = written(tmp_path, "a.jsonl", "\n\n".join(json.dumps(line) for line in lines))
    found = read_sequences(path, tokenizer, 16, 9)
    assert [tokenizer.decode(ids).strip() for ids in found[:2]] == ["What a day", "it was."]
    assert found[2:] == [[5, 6, 7, 8, 9], [1, 2]]
    assert read_sequences(path, tokenizer, 16, 3) == found[:3]


def test_ids_are_taken_as_they_are(tmp_path):
    path = written(tmp_path, "a.ids", "1 2 3 4 5\n\n6,7, 8\n")
    assert read_sequences(path, None, 3, 9) == [[1, 2, 3], [4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "1", r"\*\.txt, \*\.jsonl, \*\.ids"),
        ("a.ids", "1 2\n3 x", "line 2 must hold token ids"),
        ("a.ids", "1 2 99999", "token 99999.* 0 to 2047"),
        ("a.ids", "1\n2", "no sequence of 2 tokens"),
        ("a.jsonl", "{}", 'line 1 must be text, {"text"'),
        ("a.jsonl", "[1, true]", "line 1 must be text"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", "[" * 200_000, "line 1 is not JSON"),
        ("a.txt", "some text", "no tokenizer.json; give token ids"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, text, says):
    with pytest.raises(TextError, match=says):
        read_sequences(written(tmp_path, name, text), None, 16, 8, vocab_size=2048)


def test_no_file_no_utf8_and_no_room(tmp_path, tokenizer):
    with pytest.raises(TextError, match="No such file"):
        read_sequences(tmp_path / "none.txt", tokenizer, 16, 8)
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(TextError, match="not UTF-8"):
        read_sequences(tmp_path / "latin.txt", tokenizer, 16, 8)
    with pytest.raises(TextError, match="no room after the prefix"):
        cut_text("some text", tokenizer, 3)


def test_random_ids_are_seeded():
    assert random_sequences(100, 8, 3) == random_sequences(100, 8, 3)
    assert {len(ids) for ids in random_sequences(100, 8, 3)} == {8}
