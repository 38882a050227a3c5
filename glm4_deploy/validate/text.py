"""The text that a comparison reads: a user's, the bundled corpus, or random ids where there is no tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from glm4_deploy.texts import prefix_of, random_sequences, read_sequences
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.errors import TextError
from glm4_runtime.tokenizer import TOKENIZER, Tokenizer

CORPUS = "corpus.jsonl"
OWN_TEXT = "heldout.txt"  # in the checkpoint's folder: text like that which the model was trained on


@dataclass(frozen=True)
class Text:
    """Sequences of token ids, and where they are from.

    Attributes:
        prefix: so many tokens at the start of each sequence are the tokenizer's, and not predicted.
        is_text: False for token ids that were given or drawn: they tell numeric errors, whatever they mean.
    """

    sequences: Sequence[Sequence[int]]
    source: str
    tokenizer: Tokenizer | None
    prefix: int
    is_text: bool = True

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


def choose_text(checkpoint: Checkpoint, path: Path | None, length: int, max_tokens: int) -> Text:
    """At most ``max_tokens`` tokens, in sequences of at most ``length``.

    The text is the user's file, else ``heldout.txt`` in the checkpoint's folder, else the bundled corpus, else
    random ids.

    Raises:
        TextError: the file cannot be read as text or token ids of this model.
    """
    has_tokenizer = (checkpoint.folder / TOKENIZER).is_file()
    tokenizer = Tokenizer.from_folder(checkpoint.folder) if has_tokenizer else None
    vocab = checkpoint.config.vocab_size
    # Documents end where they end: there are more sequences than full ones would be.
    limit = max_tokens // 2
    found: list[list[int]] = []
    own = checkpoint.folder / OWN_TEXT
    if path is None and tokenizer is not None and own.is_file():
        path = own
    if path is not None:
        found, source = read_sequences(path, tokenizer, length, limit, vocab), str(path)
        is_text = path.suffix != ".ids"
    elif tokenizer is not None:
        with as_file(files(__package__).joinpath(CORPUS)) as corpus:
            found = read_sequences(corpus, tokenizer, length, limit)
        found = [ids for ids in found if max(ids) < vocab]  # a tokenizer may be wider than a cut-down model
        source, is_text = "the bundled corpus", True
    if not found:
        found = random_sequences(vocab, length, -(-max_tokens // length))
        source = f"random token ids, since {checkpoint.folder} has no {TOKENIZER} of its vocabulary"
        is_text = False
    prefix = len(prefix_of(tokenizer)) if is_text and _all_begin_with(found, prefix_of(tokenizer)) else 0
    sequences = _first_tokens(found, max_tokens)
    if not any(len(ids) > prefix + 1 for ids in sequences):
        raise TextError(f"{max_tokens} tokens of {source} leave nothing to predict; allow more")
    return Text(sequences, source, tokenizer, prefix, is_text)


def _all_begin_with(sequences: Sequence[Sequence[int]], prefix: Sequence[int]) -> bool:
    return all(list(ids[: len(prefix)]) == list(prefix) for ids in sequences)


def _first_tokens(sequences: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    kept: list[Sequence[int]] = []
    for ids in sequences:
        if count < 2:
            break
        kept.append(ids[:count])
        count -= len(ids)
    return kept


def hex_of_bytes(token: str) -> str:
    """The bytes of a byte-level token, as ``<E4 BD>``; the token itself if it is not one.

    Byte-level tokenizers write a byte that is a printable Latin-1 character as that character, and the others, in
    order, as the characters from U+0100 on.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    bytes_of = {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(others)}
    if not all(character in bytes_of for character in token):
        return token
    return f"<{' '.join(f'{bytes_of[character]:02X}' for character in token)}>"
