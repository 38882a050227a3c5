"""Chooses the text of a comparison: the user's, the built-in corpus, or random ids without a tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from glm4_deploy.own_text import IDS, own_text
from glm4_deploy.texts import prefix_of, random_sequences, read_sequences
from glm4_exporters.checkpoint import Checkpoint
from glm4_runtime.bundle.file_names import TOKENIZER
from glm4_runtime.errors import TextError
from glm4_runtime.tokenizer import Tokenizer

CORPUS = "corpus.jsonl"


@dataclass(frozen=True)
class Text:
    """Sequences of token ids, and their source.

    Attributes:
        prefix: number of tokens at the start of each sequence that the tokenizer added; they are not predicted.
        is_random: drawn ids, by which quality is not judged.
        is_text: False for given or random token ids, which show numeric errors only.
    """

    sequences: Sequence[Sequence[int]]
    source: str
    tokenizer: Tokenizer | None
    prefix: int
    is_text: bool = True
    is_random: bool = False

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


def choose_text(checkpoint: Checkpoint, path: Path | None, length: int, max_tokens: int) -> Text:
    """At most ``max_tokens`` tokens, in sequences of at most ``length``.

    The first that exists of: the file ``path``, the checkpoint's own text, the built-in corpus (with a tokenizer),
    random ids.

    Raises:
        TextError: the file cannot be read as text or token ids of this model.
    """
    has_tokenizer = (checkpoint.folder / TOKENIZER).is_file()
    tokenizer = Tokenizer.from_folder(checkpoint.folder) if has_tokenizer else None
    vocab = checkpoint.config.vocab_size
    # Documents are shorter than full sequences, so more sequences are needed.
    limit = max_tokens // 2
    found: list[list[int]] = []
    is_random = False
    own = own_text(checkpoint.folder)
    if path is None and own is not None and (tokenizer is not None or own.suffix == IDS):
        path = own
    if path is not None:
        found, source = read_sequences(path, tokenizer, length, limit, vocab), str(path)
        is_text = path.suffix != IDS
    elif tokenizer is not None:
        with as_file(files(__package__).joinpath(CORPUS)) as corpus:
            found = read_sequences(corpus, tokenizer, length, limit)
        found = [
            ids for ids in found if max(ids) < vocab
        ]  # a tokenizer may have more tokens than a reduced model
        source, is_text = "the bundled corpus", True
    if not found:
        found = random_sequences(vocab, length, -(-max_tokens // length))
        source = f"random token ids, since {checkpoint.folder} has no {TOKENIZER} of its vocabulary"
        is_text, is_random = False, True
    prefix = len(prefix_of(tokenizer)) if is_text and _all_begin_with(found, prefix_of(tokenizer)) else 0
    sequences = _first_tokens(found, max_tokens)
    if not any(len(ids) > prefix + 1 for ids in sequences):
        raise TextError(f"{max_tokens} tokens of {source} leave nothing to predict; allow more")
    return Text(sequences, source, tokenizer, prefix, is_text, is_random)


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
    """The bytes of a byte-level token, such as ``<E4 BD>``; other tokens unchanged.

    Byte-level tokenizers write a byte that is a printable Latin-1 character as this character. The other bytes
    become, in order, the characters from U+0100 on.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    bytes_of = {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(others)}
    if not all(character in bytes_of for character in token):
        return token
    return f"<{' '.join(f'{bytes_of[character]:02X}' for character in token)}>"
