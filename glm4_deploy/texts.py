"""Reads a user's text as token sequences, for calibration, sensitivity and validate.

    notes.txt     one document: tokenized, then cut
    lines.jsonl   a document per line: "text", {"text": "..."}, [5, 17, ...] or {"input_ids": [5, 17, ...]}
    tokens.ids    a document per line, as token ids with spaces or commas between

A sequence never spans two documents. Text is tokenized without the tokenizer's prefix (GLM-4: [gMASK]<sop>), then
cut. Each sequence then gets the prefix, as in the model's training. Token ids are not changed.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from glm4_deploy.own_text import IDS
from glm4_runtime.errors import TextError
from glm4_runtime.tokenizer import Tokenizer

# Our own lines, for commands without a text. They mix kinds of text that tokenizers treat differently.
LINES = (
    "The river had risen in the night, and by morning the lower fields lay under a sheet of grey water.",
    "In the beginning the workshop had two rooms: one for the tools, and one for whatever had to dry.",
    "春天来了，河水涨了起来，孩子们在岸边数着漂过的木头。今天一共有三十七根。",
    "def area(width: float, height: float) -> float:\n    return width * height  # 3.5 * 12 = 42.0\n",
    "A",
)

SHORTEST = 2  # a shorter sequence has no token to predict
READ_CHARACTERS = 1 << 20  # characters of a document that are tokenized at a time; cut at the end of a line


def read_sequences(
    path: str | Path, tokenizer: Tokenizer | None, length: int, limit: int, vocab_size: int | None = None
) -> list[list[int]]:
    """The first ``limit`` sequences of a file, each of at most ``length`` tokens.

    Reads only the needed part of the file. Only the last sequence of a document is shorter than ``length``.

    Args:
        tokenizer: needed for text; may be None for token ids.
        vocab_size: the model's; ids beyond it are refused.

    Raises:
        TextError: naming the file and line.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise TextError(
            f"{path} must be one of {', '.join(f'*{suffix}' for suffix in READERS)}: text, a document per line, or ids"
        )
    try:
        with path.open(encoding="utf-8-sig") as file:
            found = list(islice(READERS[path.suffix](path, file, tokenizer, length), limit))
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not found:
        raise TextError(f"{path} holds no sequence of {SHORTEST} tokens or more")
    if vocab_size is not None:
        _check_ids(path, found, vocab_size)
    return found


def cut_text(text: str, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """The sequences of one document in memory."""
    return list(_cut_text(iter([text]), tokenizer, length))


def random_sequences(vocab_size: int, length: int, count: int, seed: int = 20250414) -> list[list[int]]:
    """Seeded random ids, without text or a tokenizer. They show numeric errors, not quality."""
    ids: list[list[int]] = np.random.default_rng(seed).integers(0, vocab_size, (count, length)).tolist()
    return ids


def prefix_of(tokenizer: Tokenizer | None) -> list[int]:
    """The ids that the tokenizer adds before every text."""
    return [] if tokenizer is None else tokenizer.encode("")


def _text_file(path: Path, file: TextIO, tokenizer: Tokenizer | None, length: int) -> Iterator[list[int]]:
    blocks = iter(lambda: file.read(READ_CHARACTERS) + file.readline(), "")
    yield from _cut_text(blocks, _needed(tokenizer, path), length)


def _json_lines(path: Path, file: TextIO, tokenizer: Tokenizer | None, length: int) -> Iterator[list[int]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        document = _json_document(f"{path}, line {number}", line)
        if isinstance(document, str):
            yield from _cut_text(iter([document]), _needed(tokenizer, path), length)
        else:
            yield from _cut(iter(document), length)


def _json_document(where: str, line: str) -> str | list[int]:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where} is not JSON: {error}") from error
    if isinstance(value, dict):
        value = value.get("text", value.get("input_ids"))
    if isinstance(value, str) or (isinstance(value, list) and all(type(i) is int for i in value)):
        return value
    raise TextError(f'{where} must be text, {{"text": text}}, a list of token ids or {{"input_ids": ids}}')


def _id_lines(
    path: Path,
    file: TextIO,
    tokenizer: Tokenizer | None,  # noqa: ARG001  the readers' one signature
    length: int,
) -> Iterator[list[int]]:
    for number, line in enumerate(file, 1):
        try:
            ids = [int(word) for word in line.replace(",", " ").split()]
        except ValueError as error:
            raise TextError(f"{path}, line {number} must hold token ids only: {error}") from error
        yield from _cut(iter(ids), length)


READERS = {".txt": _text_file, ".jsonl": _json_lines, IDS: _id_lines}


def _cut_text(blocks: Iterator[str], tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    prefix = prefix_of(tokenizer)
    if length < len(prefix) + SHORTEST:
        raise TextError(
            f"sequences of {length} tokens leave no room after the prefix of {len(prefix)}; take longer ones"
        )
    ids = (i for text in blocks for i in tokenizer.encode(text, add_special_tokens=False))
    for piece in _cut(ids, length - len(prefix)):
        yield prefix + piece


def _cut(ids: Iterator[int], length: int) -> Iterator[list[int]]:
    while len(piece := list(islice(ids, length))) >= SHORTEST:
        yield piece


def _needed(tokenizer: Tokenizer | None, path: Path) -> Tokenizer:
    if tokenizer is None:
        raise TextError(f"{path} is text, but there is no tokenizer.json; give token ids, in a file *.ids")
    return tokenizer


def _check_ids(path: Path, sequences: list[list[int]], vocab_size: int) -> None:
    wrong = next((i for ids in sequences for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise TextError(
            f"{path} holds the token {wrong}; ids of this model go from 0 to {vocab_size - 1}. "
            "Is the tokenizer the checkpoint's own?"
        )
